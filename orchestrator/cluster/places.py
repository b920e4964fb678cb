"""Where the actors of a run may live: placement groups, all in one or each apart."""

import time

from ray.exceptions import GetTimeoutError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


class Places:
    """One for each of `bundles`, which are in Ray's names what it holds.

    Together they come all at once or not at all; but while one of them has lost its node, Ray places no actor in any
    other. So a run that can do without some has them `apart`. With `spread`, each is on a node of its own."""

    def __init__(self, bundles: list[dict[str, float]], *, spread: bool, apart: bool):
        self.bundles, self.apart = bundles, apart and not spread
        strategy = "STRICT_SPREAD" if spread else "PACK"
        self.groups = [placement_group([bundle]) for bundle in bundles] if self.apart else [
            placement_group(bundles, strategy=strategy)]

    def wait(self, timeout_s: float) -> None:
        """Until all are there; `GetTimeoutError`. In short turns, between which a signal is heard; `ready()` would
        take a process for the question."""
        deadline = time.monotonic() + timeout_s
        for group in self.groups:
            while not group.wait(1.0):
                if time.monotonic() > deadline:
                    raise GetTimeoutError(f"{len(self.groups)} placement groups")

    def strategy(self, place: int) -> PlacementGroupSchedulingStrategy:
        """For an actor that is to live there."""
        group, index = (self.groups[place], 0) if self.apart else (self.groups[0], place)
        return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)

    def nodes(self) -> list[str]:
        """Ray's id of the node that each place is on, or was last; empty without one."""
        return [node for group in self.groups
                for _, node in sorted(placement_group_table(group)["bundles_to_node_id"].items())]

    def renew(self, place: int) -> bool:
        """Ask anew for a place apart whose node is gone, and say whether that was so. Ray would try to find another
        without a pause, which takes a core of its head (ray#65007)."""
        if not self.apart or placement_group_table(self.groups[place])["state"] != "RESCHEDULING":
            return False
        remove_placement_group(self.groups[place])
        self.groups[place] = placement_group([self.bundles[place]])
        return True

    def remove(self) -> None:
        for group in self.groups:
            remove_placement_group(group)

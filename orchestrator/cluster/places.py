"""Where the actors of a run may live: placement groups, all in one or each apart."""

import time

from ray.exceptions import GetTimeoutError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

NODE = "ray.io/node-id"
"""Ray's own label of a node."""


class Places:
    """One for each of `bundles`, which are in Ray's names what it holds, then one for each of `spares`. With `spread`,
    each of the first is on a node of its own, and the spares are where there is room beside them.

    In one group they come all at once or not at all; but while one of them has lost its node, Ray places no actor in
    any other. So a run that can do without some has them `apart`: spread ones come together and are then parted."""

    def __init__(self, bundles: list[dict[str, float]], *, spread: bool, apart: bool,
                 spares: list[dict[str, float]] = ()):
        self.bundles, self.spread, self.apart = [*bundles, *spares], spread, apart
        self.together = len(bundles) if spread else len(self.bundles)
        """So many come at once; spread ones before the spares, which could be in their way."""
        if apart and not spread:
            self.groups = [placement_group([bundle]) for bundle in self.bundles]
        else:
            first = self.bundles[:self.together]
            self.groups = [placement_group(first, strategy="STRICT_SPREAD" if spread else "PACK")]

    def wait(self, timeout_s: float) -> None:
        """Until all are there; `GetTimeoutError`."""
        deadline = time.monotonic() + timeout_s
        self._wait(deadline)
        if self.apart and self.spread:
            nodes = self.nodes()
            self.remove()
            self.groups = [placement_group([bundle], bundle_label_selector=[{NODE: node}])
                           for bundle, node in zip(self.bundles[:self.together], nodes, strict=True)]
            self._wait(deadline)
        if rest := self.bundles[self.together:]:
            self.groups += [placement_group([bundle]) for bundle in rest] if self.apart else [placement_group(rest)]
            self._wait(deadline)

    def strategy(self, place: int) -> PlacementGroupSchedulingStrategy:
        """For an actor that is to live there."""
        if self.apart:
            group, index = place, 0
        else:
            group, index = (0, place) if place < self.together else (1, place - self.together)
        return PlacementGroupSchedulingStrategy(self.groups[group], placement_group_bundle_index=index)

    def nodes(self) -> list[str]:
        """Ray's id of the node that each place is on, or was last; empty without one."""
        table = placement_group_table()
        return [node for group in self.groups
                for _, node in sorted(table[group.id.hex()]["bundles_to_node_id"].items())]

    def renew(self, place: int) -> bool:
        """Ask anew for a place apart whose node is gone, and say whether that was so. Ray would try to find another
        without a pause, which takes a core of its head (ray#65007). Also for one on the same node as another, which two
        that were asked for at once may find."""
        if not self.apart:
            return False
        nodes = self.nodes()
        spread = nodes[:self.together] if self.spread and place < self.together else []
        taken = {node for other, node in enumerate(spread) if other != place and node}
        is_lost = placement_group_table(self.groups[place])["state"] == "RESCHEDULING"
        if not is_lost and nodes[place] not in taken:
            return False
        remove_placement_group(self.groups[place])
        elsewhere = [{NODE: f"!in({','.join(sorted(taken))})"}] if taken else None
        self.groups[place] = placement_group([self.bundles[place]], bundle_label_selector=elsewhere)
        return True

    def remove(self) -> None:
        for group in self.groups:
            remove_placement_group(group)

    def _wait(self, deadline: float) -> None:
        """In short turns, between which a signal is heard; `ready()` would take a process for the question."""
        for group in self.groups:
            while not group.wait(1.0):
                if time.monotonic() > deadline:
                    raise GetTimeoutError(f"{len(self.groups)} placement groups")

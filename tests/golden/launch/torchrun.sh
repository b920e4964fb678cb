#!/bin/sh
# sparing-tiny-20261125-120000: 2 x 2 ranks, without Ray. To be started on every node.
cd /checkout || exit 3
export PATH=/env/bin:"$PATH"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # cluster.save_timeout_s: after SIGTERM the ranks save
exec torchrun --nnodes 2 --nproc-per-node 2 \
    --rdzv-backend c10d --rdzv-endpoint node1:29400 --rdzv-id sparing-tiny \
    -m orchestrator train experiment=tiny cluster.ranks_per_node=2 'data.path='"'"'/corpus/a b.txt'"'"'' run.dir=/shared/sparing/runs/tiny-20261125-120000 resume=auto

#!/bin/sh
# sparing-tiny-20261125-120000: a job of a running Ray cluster. From any machine that reaches its dashboard: sh THIS_FILE
# The token is the one in RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
exec ray job submit --address http://head:8265 --submission-id sparing-tiny-20261125-120000 --working-dir /checkout \
    --runtime-env-json '{"pip": ["torch==2.13.0", "ray==2.60.0", "hydra-core==1.3.8", "omegaconf==2.3.1", "wandb==0.31.0", "fsspec==2026.9.0", "s3fs==2026.9.0", "grain==0.2.18", "numpy==2.4.6", "rich==15.0.0", "safetensors==0.8.0", "tenacity==9.2.1", "tokenizers==0.23.3", "pyarrow==26.0.1"]}' \
    -- python -m orchestrator train experiment=tiny cluster.ranks_per_node=2 'data.path='"'"'/corpus/a b.txt'"'"'' cluster.join_timeout_s=600 run.dir=/shared/runs/mine resume=auto

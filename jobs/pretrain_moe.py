"""Pretraining of a mixture-of-experts decoder on text, with routers that follow their experts (MPI) or plain ones.

python jobs/pretrain_moe.py --config jobs/configs/pretrain_moe/local.yaml router.mpi=false
python jobs/pretrain_moe.py --config jobs/configs/pretrain_moe/local.yaml --study router --seeds 0,1,2
"""

import sys

from raysys import job
from raysys.config.pretraining import PretrainMoeConfig
from raysys.studies.pretrain_moe import STUDIES

if __name__ == "__main__":
    sys.exit(job.main("pretrain_moe", PretrainMoeConfig, studies=STUDIES))

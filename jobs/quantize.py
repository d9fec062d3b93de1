"""Weights of a checkpoint in 2 to 8 bits, by layer: which layers get more (NSDS), and how to spend few well (D2Quant).

python jobs/quantize.py --config jobs/configs/quantize/local.yaml method=gptq allocation=first_half
python jobs/quantize.py --config jobs/configs/quantize/local.yaml --study sensitivity --seeds 0,1,2
"""

import sys

from raysys import job
from raysys.config.quantising import QuantizeConfig
from raysys.studies.quantize import STUDIES

if __name__ == "__main__":
    sys.exit(job.main("quantize", QuantizeConfig, studies=STUDIES))

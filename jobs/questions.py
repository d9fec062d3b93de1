"""Questions, a corpus and transcripts for a search agent, of a generated world or of published question sets.

python jobs/questions.py --config jobs/configs/questions/local.yaml world.documents=800
"""

import sys

from raysys import job
from raysys.config.agents import QuestionsConfig

if __name__ == "__main__":
    sys.exit(job.main("questions", QuestionsConfig))

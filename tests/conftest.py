import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

# Threads that wait for each other make tiny tensors a hundred times slower on a busy machine.
torch.set_num_threads(1)

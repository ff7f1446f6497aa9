import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

# Before torch is imported, and for the scripts that tests start: threads that wait for each other
# make tiny tensors a hundred times slower on a busy machine, and tests run side by side.
os.environ['OMP_NUM_THREADS'] = '1'

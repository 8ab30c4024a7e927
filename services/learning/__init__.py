"""The learning service. Importing it sets what torch's libraries read from the environment when they are loaded."""

import os

# Threads that wait for each other sleep: with other work on the same cores, spinning makes a training step ten times
# as slow.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# cuBLAS sums in a fixed order only with this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

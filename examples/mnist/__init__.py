"""The MNIST study of stable neural ODEs, built from the public blocks of `odelayers`."""

import os

# Before torch is loaded: OpenMP's threads sleep while they wait. Spinning instead, which is the default, makes training
# on all cores ten times slower and more as soon as another process wants one of them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

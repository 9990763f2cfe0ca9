"""What train_cifar10.py needs beside the network, the loss and the step: options, data, files, processes, report."""

import os

# OpenMP's threads wait for each other hundreds of times a step. Spinning while they wait steals the core from the thread that is
# waited for as soon as anything else runs: a step of the digits run took 1176 ms so, and 113 ms asleep, on 2 busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

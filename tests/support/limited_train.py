"""This program is the train command in a process whose memory cannot grow by more than SCMOE_LIMIT_GIB."""

import os
import resource
import sys
from pathlib import Path

from experiments.train import main

if __name__ == "__main__":
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = pages * resource.getpagesize() + int(float(os.environ["SCMOE_LIMIT_GIB"]) * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    sys.exit(main(sys.argv[1:]))

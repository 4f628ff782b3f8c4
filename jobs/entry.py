"""What runs on the cluster for `metadist submit`: `python -m metadist.jobs.entry [VERB] JOB [KEY=VALUE]… [--id ID]`.

It reserves nothing. The run that it looks after is a process of its own.
"""

import sys

from metadist.submit.supervisor import main

if __name__ == "__main__":
    sys.exit(main())

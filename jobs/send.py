"""What runs on the cluster for `metadist jobs fetch`: `python -m metadist.jobs.send RUN STORAGE`.

It prints the files of a stored run.
"""

import sys

from metadist.submit.fetch import main

if __name__ == "__main__":
    sys.exit(main())

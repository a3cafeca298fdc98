"""A batch worker process that is killed by rows whose prompt is "kill", and once by one whose prompt is "kill once".

Run as a module in place of `zimage_core.batch.processes`; ONCE names a file that says it has happened.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from zimage_core.batch import pictures, processes


class Dying(pictures.PictureGenerator):
    def generate(self, rows):
        for row in rows:
            once = row.settings["prompt"] == "kill once" and not Path(os.environ["ONCE"]).exists()
            if once:
                Path(os.environ["ONCE"]).touch()
            if once or row.settings["prompt"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(rows)


if __name__ == "__main__":
    pictures.PictureGenerator = Dying
    os._exit(processes.main())

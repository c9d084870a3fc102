"""Draw the controls of a dataset file in a process that is killed before its nth change: a script for `processes`."""

import os
import sys

from cache_tools import make_control
from dataset.settings import DatasetSettings
from tests.unit.killing import kill_at

if __name__ == "__main__":
    config, moment = sys.argv[1:]
    kill_at(int(moment), ((os, "replace"), (make_control, "write_video")))
    make_control.make_controls(DatasetSettings(config), "canny")

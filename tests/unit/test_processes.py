"""What the tests start stands for what a user starts: its own process, its exit code, its words, its workers."""

import os
import signal
from pathlib import Path

from tests import processes


def test_a_script_ends_with_its_exit_code_and_words() -> None:
    done = processes.run("wan_train_network.py", "--dit", "absent.safetensors", expect=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and done.stdout == ""
    assert "--blocks_to_swap" in processes.run("wan_train_network.py", "--help").stdout


def test_a_signal_reaches_it_and_is_told_as_a_shell_would() -> None:
    started = processes.start("wan_generate_video.py", "--interactive")
    assert started.pid is not None and started.pid != os.getpid()
    started.send_signal(signal.SIGKILL)
    assert started.wait(30) == -signal.SIGKILL


def test_ranks_have_what_torchrun_sets(tmp_path: Path) -> None:
    script = tmp_path / "told.py"
    script.write_text(
        "import multiprocessing, os, sys\nassert 'torch' in sys.modules\n"
        "print(os.environ['RANK'], os.environ['WORLD_SIZE'], multiprocessing.get_start_method())\n"
    )
    out = processes.run(str(script), ranks=2).stdout
    assert out.splitlines() == ["0 2 fork", "1 2 fork"]

"""Damaged files through every public door: some here, thousands by tests/fuzz.py."""

import os
import signal
import subprocess
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("limits a process's memory as Linux does", allow_module_level=True)

import fuzz

from common.flags import InputError


def test_nothing_but_an_input_error_comes_out(tmp_path):
    command = [sys.executable, fuzz.__file__, "--cases", "140", "--seed", "1", "--keep", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 escapes, " in done.stdout


def refuse(message):
    raise InputError(message)


ESCAPES = {
    "a crash": (lambda root: os.kill(os.getpid(), signal.SIGSEGV), "killed by SIGSEGV"),
    "a hang": (lambda root: signal.pause(), "hangs"),
    "another error": (lambda root: {}["x"], "KeyError: 'x'"),
    "a bomb": (lambda root: bytearray(2**31), "MemoryError"),
    "a program": (lambda root: os.system("true"), "forbidden: os.system"),
    "a file read": (lambda root: open("/etc/passwd").read(), "forbidden: open"),
    "a file written": (lambda root: (root.parent / "elsewhere").touch(), "forbidden: open"),
    "a long message": (lambda root: refuse("x" * 10**6), "not one line"),
    "two lines": (lambda root: refuse("a\nb"), "not one line"),
    "none": (lambda root: None, ""),
    "a refusal": (lambda root: refuse("a.jpg: no picture"), ""),
}


@pytest.mark.parametrize("enter, seen", ESCAPES.values(), ids=ESCAPES)
def test_whatever_escapes_is_seen(enter, seen, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 1 if seen == "hangs" else 60)
    _, escape = fuzz.escape_of(fuzz.Door(None, enter, ()), tmp_path)
    log = tmp_path / "said.log"
    assert seen in escape + (log.read_text() if log.exists() else "")
    assert bool(escape) == bool(seen)

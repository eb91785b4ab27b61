"""Whatever could escape from tests/fuzz.py's cases is seen; CI runs some hundred of them."""

import os
import signal
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("limits a process's memory as Linux does", allow_module_level=True)

import fuzz

from common.flags import InputError


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


@pytest.mark.parametrize("escapes", [False, True])
def test_an_escape_ends_the_program_with_its_files_kept(escapes, tmp_path, monkeypatch, capsys):
    """The door takes a file as it is, and refuses or escapes from a damaged one."""

    def enter(root):
        if (root / "file.txt").read_text() == "damaged":
            raise {True: ValueError, False: InputError}[escapes]("file.txt: damaged")

    door = fuzz.Door(lambda root: (root / "file.txt").write_text("whole"), enter, ("*.txt",))
    monkeypatch.setattr(fuzz, "DOORS", {"door": door})
    monkeypatch.setattr(fuzz, "damage", lambda path, rng: path.write_text("damaged"))
    with pytest.raises(SystemExit) as end:
        fuzz.main(["--cases", "5", "--keep", str(tmp_path)])
    assert end.value.code == escapes
    said, kept = capsys.readouterr().out, sorted(path.name for path in tmp_path.iterdir())
    assert f"5 cases, {5 * escapes} escapes" in said
    assert kept == ["door-0-0", "door-0-1", "door-0-2"] * escapes
    assert not escapes or (tmp_path / kept[0] / "said.log").read_text().endswith("damaged\n")

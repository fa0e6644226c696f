"""Output paths, and files and directories that are written whole or not at all."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, StandIn

from kronygpt import files
from kronygpt.configurator import UserError
from kronygpt.files import atomic_directory, atomic_write, output_directory, output_file


def listing(folder="."):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def write_directory(path, **contents):
    with atomic_directory(path, lambda name: not name.startswith("my")) as aside:
        for name, text in contents.items():
            (aside / name).write_text(text)


def mode_of(path):
    return oct(Path(path).stat().st_mode & 0o7777)


@pytest.fixture
def here(workdir):
    """A directory with something of each kind in it."""
    for name in "folder", "folder/in", "other":
        Path(name).mkdir()
    Path("file").write_text("old", encoding="utf-8")
    os.mkfifo("pipe")
    Path("link").symlink_to("file")
    Path("link_to_folder").symlink_to("folder")
    Path("link_to_pipe").symlink_to("pipe")
    Path("dangling").symlink_to("other/none")
    return workdir


@pytest.mark.parametrize("path, words", [
    ("file/in/it", "file is a file"), *((path, "names a directory, a device or a read-only file") for path in (
        "new/", "file/", "", "new/..", "folder", "link_to_folder", "pipe", "link_to_pipe", "/dev/null"))])
def test_what_is_no_file_is_refused_before_the_work(path, words, here):
    before = listing()
    for write in output_file, lambda path: atomic_write(path).__enter__():
        with pytest.raises(UserError, match=words):
            write(path)
    assert listing() == before


def test_what_is_no_directory_or_cannot_be_replaced_is_refused(here):
    before = listing()
    for path in "file", "file/in/it", "pipe":
        with pytest.raises(UserError, match=f"{path[:4]} is a file"):
            output_directory(path)
        with pytest.raises(OSError):
            write_directory(path)
    for path in ".", "..", "link_to_folder/..":
        with pytest.raises(UserError, match="current directory"):
            write_directory(path)
        assert output_directory(path) == Path(path)  # in which files may be written
    assert listing() == before


@pytest.mark.parametrize("path", ["new", "a/b/new", "link", "dangling", "file", "folder/../file"])
def test_what_can_be_a_file_is_written(path, here):
    assert output_file(path) == Path(path)
    is_link = Path(path).is_symlink()
    with atomic_write(path, "w") as file:
        file.write("déjà")
    assert Path(path).read_bytes() == "déjà".encode() and Path(path).is_symlink() == is_link


@pytest.mark.parametrize("path", ["new", "a/b/new", "folder", "link_to_folder", "folder/in/", "../other_folder"])
def test_what_can_be_a_directory_is_written(path, here):
    is_link = Path(path).is_symlink()
    write_directory(path, a="new")
    assert listing(path)[0] == "a" and Path(path).is_symlink() == is_link


@pytest.mark.parametrize("locked, decide, paths", [
    ("file", output_file, ["file", "link"]), (".", output_file, ["new", "a/b"]), (".", output_directory, ["a/b"]),
    ("folder", output_file, ["folder/new"]), ("folder", output_directory, ["folder"])])
def test_a_path_without_permission_is_refused_before_the_work(locked, decide, paths, here, monkeypatch):
    """A read-only result is there to stay."""
    monkeypatch.setattr(files, "os", StandIn(os, access=lambda path, mode: not os.path.samefile(path, locked)))
    for path in paths:
        with pytest.raises(UserError, match="read-only"):
            decide(path)


def test_what_replaces_a_file_or_a_directory_keeps_its_mode(workdir):
    old = os.umask(0o022)
    for name, mode in ("new", None), ("private", 0o600), ("shared", 0o664):
        if mode:
            Path(name).touch()
            Path(name).chmod(mode)
        with atomic_write(name, "w") as file:
            file.write("x")
            assert mode is None or mode_of(next(Path().glob(".*.tmp"))) == oct(mode)  # from its first byte on
        assert mode_of(name) == oct(mode or 0o644)
    write_directory("made", a="old", my="mine")
    assert mode_of("made") == oct(0o755)
    Path("made").chmod(0o2770)
    Path("made/a").chmod(0o640)
    Path("made/my").chmod(0o400)
    write_directory("made", a="new", b="new")
    assert [mode_of(path) for path in ("made", "made/a", "made/b", "made/my")] == ["0o2770", "0o640", "0o644", "0o400"]
    os.umask(old)


def test_a_block_that_fails_leaves_what_was_there(here):
    write_directory("made", a="old")
    before = listing()
    for write, path in ((atomic_write, "file"), (lambda path: atomic_directory(path, str), "made"), (atomic_write, "none")):
        with pytest.raises(KeyboardInterrupt), write(path):
            raise KeyboardInterrupt
    assert listing() == before
    assert [Path(name).read_text(encoding="utf-8") for name in ("file", "made/a")] == ["old", "old"]


def test_files_of_others_in_a_directory_come_along(workdir):
    write_directory("made", a="old", b="old", my_notes="mine")
    Path("made/my_folder").mkdir()
    Path("made/my_folder/deep").write_text("mine", encoding="utf-8")
    Path("made/my_link").symlink_to("../elsewhere")
    write_directory("made", a="new")
    assert listing("made") == ["a", "my_folder", "my_folder/deep", "my_link", "my_notes"]
    assert Path("made/a").read_text(encoding="utf-8") == "new" and os.readlink("made/my_link") == "../elsewhere"


def killed(code):
    """Run code that ends with SIGKILL."""
    imports = ("import os, shutil\nfrom kronygpt.files import atomic_directory, atomic_write\n"
               "def die(*args, **options): os.kill(os.getpid(), 9)\n")
    done = subprocess.run([sys.executable, "-c", imports + code], env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == -9


def test_the_next_write_of_a_name_clears_what_a_kill_left(workdir):
    killed("with atomic_write('made', 'w') as file: file.write('x'); file.flush(); die()")
    killed("with atomic_directory('made', str) as path: (path / 'a').write_text('x'); die()")
    for name in ".mine.0123456789ab.tmp", ".made.mine.tmp", "made.tmp":
        Path(name).touch()
    assert len(listing()) >= 5
    with atomic_write("made", "w") as file:
        file.write("new")
    assert listing() == [".made.mine.tmp", ".mine.0123456789ab.tmp", "made", "made.tmp"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_directory_survives_a_kill_between_any_two_renames(renames, workdir):
    write_directory("made", a="old", my="mine")
    killed(f"replace, left = os.replace, [1] * {renames}\n"
           "os.replace = lambda *args: replace(*args) if left and left.pop() else die()\n"
           "shutil.rmtree = die\n"
           "with atomic_directory('made', lambda name: name != 'my') as aside: (aside / 'a').write_text('new')")
    complete = [path.read_text() for path in Path().glob("*made*/a")]
    assert sorted(complete) == ["new", "old"] and Path("made").exists() == (renames != 1)
    write_directory("made", b="newer")
    assert listing() == ["made", "made/b", "made/my"]


def test_a_directory_whose_second_rename_fails_is_put_back(workdir, monkeypatch):
    def replace(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        os.replace(source, target)

    write_directory("made", a="old")
    monkeypatch.setattr(files, "os", StandIn(os, replace=replace))
    with pytest.raises(OSError, match="Input/output"):
        write_directory("made", a="new")
    assert listing() == ["made", "made/a"] and Path("made/a").read_text(encoding="utf-8") == "old"


def test_two_writers_of_one_file_do_not_mix(workdir):
    """The one whose file was cleared away fails."""
    with pytest.raises(FileNotFoundError), atomic_write("file", "w") as one:
        one.write("one")
        with atomic_write("file", "w") as two:
            two.write("two")
    assert listing() == ["file"] and Path("file").read_text(encoding="utf-8") == "two"

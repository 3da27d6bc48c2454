"""A checkpoint is whole or absent after a kill at any step, and any damaged, missing or foreign
file is found."""

import builtins
import errno
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scmoe.files import replacing
from scmoe.parallel.checkpoint import durable

FILES = {
    "meta.json": b'{"lr": 0.1}',
    "shard-1.safetensors": bytes(range(200)),
    "shard-2.safetensors": b"\0" * 64,
}


def write(path, step, files=FILES):
    partial = durable.partial_path(path, durable.new_token())
    partial.mkdir(parents=True)
    for name, content in files.items():
        (partial / name).write_bytes(content)
    durable.commit(
        partial, path, step, {name: durable.fingerprint(partial / name) for name in files}
    )


@pytest.mark.parametrize("flips", [200, pytest.param(1000, marks=pytest.mark.faults)])
def test_any_flipped_bit_is_found(flips, tmp_path):
    """They hit random places of all files, the manifest included."""
    path = tmp_path / "a.ckpt"
    write(path, 7)
    assert os.listdir(tmp_path) == ["a.ckpt"] and durable.verify(path) == 7
    files, draw = sorted(path.iterdir()), random.Random(0)
    for _ in range(flips):
        file = draw.choice(files)
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        whole = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(durable.BrokenCheckpoint, match=file.name):
            durable.verify(path)
        file.write_bytes(whole)
    assert durable.verify(path) == 7


def test_a_shard_of_another_save_is_refused(tmp_path):
    """Steps never mix: an extra shard and a shard of another checkpoint are refused."""
    write(tmp_path / "a.ckpt", 7)
    write(tmp_path / "b.ckpt", 8, {**FILES, "shard-2.safetensors": b"\1" * 64})
    shutil.copy(tmp_path / "b.ckpt" / "shard-2.safetensors", tmp_path / "a.ckpt")
    with pytest.raises(durable.BrokenCheckpoint, match="shard-2"):
        durable.verify(tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt" / "shard-3.safetensors").write_bytes(b"")
    with pytest.raises(
        durable.BrokenCheckpoint, match=r"shard-3\.safetensors is not of this checkpoint"
    ):
        durable.verify(tmp_path / "b.ckpt")


class Killed(BaseException):
    """This is not an Exception, so `except Exception` does not catch it."""


def test_a_kill_at_any_call_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch):
    """The kill comes at every file operation of a commit over an existing checkpoint, one after the
    other, by an exchange of names (if there is one here) and by two renames."""
    kill_at_any_call(tmp_path / "exchange", monkeypatch)
    monkeypatch.setattr(durable, "exchange", lambda one, other: False)
    kill_at_any_call(tmp_path / "renames", monkeypatch)


def test_a_kill_at_any_call_of_a_first_save_leaves_a_whole_checkpoint_or_none(
    tmp_path, monkeypatch
):
    kill_at_any_call(tmp_path, monkeypatch, earlier=())


def kill_at_any_call(tmp_path, monkeypatch, earlier=(1,)):
    """earlier: steps whose checkpoints had the same name, one after the other."""
    calls = 0

    def count(function, deadline):
        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == deadline:
                raise Killed
            return function(*args, **kwargs)

        return counted

    for deadline in range(1, 100):
        folder, calls = tmp_path / str(deadline), 0
        folder.mkdir(parents=True)
        for step in earlier:
            write(folder / "a.ckpt", step)
        with monkeypatch.context() as patch:
            for name in ("rename", "fsync", "open"):
                patch.setattr(os, name, count(getattr(os, name), deadline))
            patch.setattr(durable, "exchange", count(durable.exchange, deadline))
            patch.setattr(shutil, "rmtree", count(shutil.rmtree, deadline))
            patch.setattr(builtins, "open", count(open, deadline))
            try:
                write(folder / "a.ckpt", 2)
                killed = False
            except Killed:
                killed = True
        if earlier:  # where no directory has the name, too
            assert durable.verify(durable.newest_good(folder)) in (1, 2)
        durable.sweep(folder)
        left = os.listdir(folder)
        assert left == ["a.ckpt"] or (left == [] and not earlier), "nothing lost, nothing left over"
        if left:
            assert durable.verify(folder / "a.ckpt") in ((*earlier, 2) if killed else (2,))
        if not killed:
            assert deadline > 5, "a commit has fewer file operations than expected"
            return
    raise AssertionError("a commit has too many file operations")


def test_a_kill_during_removal_leaves_no_part_of_the_checkpoint(tmp_path, monkeypatch):
    write(tmp_path / "a.ckpt", 1)
    write(tmp_path / "b.ckpt", 2)

    def killed(path, **_):
        (path / "meta.json").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            durable.remove(tmp_path / "a.ckpt")
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["b.ckpt"], (
        "no part has a name that readers open"
    )
    durable.sweep(tmp_path)
    assert os.listdir(tmp_path) == ["b.ckpt"]
    durable.remove(tmp_path / "b.ckpt")
    durable.remove(tmp_path / "b.ckpt")  # it is already removed
    assert not os.listdir(tmp_path)


def test_the_newest_whole_checkpoint_is_found_and_no_other_is_read(tmp_path, monkeypatch):
    """Broken ones are named. A folder's other checkpoints, which may be terabytes, are not read for
    their hashes."""
    for step in (1, 2, 10):
        write(tmp_path / f"step={step}.ckpt", step)
    read, fingerprint = [], durable.fingerprint
    monkeypatch.setattr(
        durable, "fingerprint", lambda path: read.append(path.parent.name) or fingerprint(path)
    )
    assert durable.newest_good(tmp_path).name == "step=10.ckpt"
    assert read == ["step=10.ckpt"] * len(FILES)

    (tmp_path / "step=10.ckpt" / "meta.json").write_bytes(b"0" * len(FILES["meta.json"]))
    with pytest.warns(UserWarning, match=r"passed over: .*step=10.ckpt.meta.json is damaged"):
        assert durable.newest_good(tmp_path).name == "step=2.ckpt"
    assert set(read) == {"step=10.ckpt", "step=2.ckpt"}
    (tmp_path / "step=10.ckpt" / "meta.json").unlink()
    with pytest.warns(UserWarning, match=r"passed over: .*step=10.ckpt.meta.json is missing"):
        assert durable.newest_good(tmp_path).name == "step=2.ckpt"
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        durable.newest_good(tmp_path / "nowhere")


def test_of_checkpoints_of_one_step_the_last_written_or_that_of_a_validation_is_taken(tmp_path):
    for i, name in enumerate(("best-step=7.ckpt", "b.ckpt", "a.ckpt")):
        write(tmp_path / name, 7)
        os.utime(tmp_path / name, (i, i))  # a copy of a run has other times
    assert durable.newest_good(tmp_path).name == "best-step=7.ckpt"
    write(tmp_path / "step=9.ckpt", 9)
    assert durable.newest_good(tmp_path, step=7).name == "best-step=7.ckpt"
    os.truncate(tmp_path / "best-step=7.ckpt/shard-2.safetensors", 5)
    with pytest.warns(UserWarning, match="passed over: .*best-step=7"):
        assert durable.newest_good(tmp_path, share=durable.UNREAD, step=7).name == "a.ckpt"
    shutil.rmtree(tmp_path / "step=9.ckpt")
    (tmp_path / "best-step=7.ckpt").rename(tmp_path / "removed")
    assert durable.newest_good(tmp_path).name == "a.ckpt"


def no_json(path):
    path.write_bytes(b"\xff{")


def a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "bad, damage, says",
    [
        ("manifest.json", no_json, "manifest.json is damaged"),
        ("manifest.json", a_folder, "has no manifest.json"),
        *(
            (bad, None, f"{bad} cannot be read: Input/output error")
            for bad in ("manifest.json", "meta.json")
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_named_and_passed_over(
    tmp_path, monkeypatch, bad, damage, says
):
    """damage: of the bad file; None: its disk fails."""

    def failing(path, *mode, plain=open):
        if str(path).endswith(f"step=2.ckpt/{bad}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(path, *mode)

    for step in (1, 2):
        write(tmp_path / f"step={step}.ckpt", step)
    if damage is not None:
        damage(tmp_path / "step=2.ckpt" / bad)
    else:
        monkeypatch.setattr(builtins, "open", failing)
        monkeypatch.setattr(Path, "read_bytes", lambda path: failing(path, "rb").read())
    with pytest.warns(UserWarning, match=f"passed over: .*step=2.ckpt.*{says}") as warned:
        assert durable.newest_good(tmp_path).name == "step=1.ckpt"
    assert [warning.category for warning in warned].count(UserWarning) == 1


def test_the_name_of_a_replaced_checkpoint_is_never_missing(tmp_path, monkeypatch):
    """Lightning's ckpt_path="last" would start from the beginning at such a moment."""
    (tmp_path / "one").mkdir(), (tmp_path / "other").mkdir()
    if not durable.exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this file system cannot exchange two names")
    write(tmp_path / "last.ckpt", 1)
    rename, seen = os.rename, []
    monkeypatch.setattr(
        os, "rename", lambda a, b: (rename(a, b), seen.append((tmp_path / "last.ckpt").exists()))
    )
    write(tmp_path / "last.ckpt", 2)
    assert all(seen) and durable.verify(tmp_path / "last.ckpt") == 2


def test_new_folders_are_durable(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(durable, "sync", synced.append)
    durable.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and set(synced) == {tmp_path, tmp_path / "a"}


def test_two_writers_of_one_folder_leave_each_others_checkpoints_alone(tmp_path):
    """Also between the two renames of the other one. If that is killed, its leftovers go."""
    write(tmp_path / "theirs.ckpt", 1)
    lines = "import sys; from pathlib import Path; from scmoe.parallel.checkpoint import durable"
    lines += "\npartial = durable.partial_path(Path(sys.argv[1]), durable.new_token())"
    lines += "\npartial.mkdir(); print(partial, flush=True); sys.stdin.read()"
    program = [sys.executable, "-c", lines, str(tmp_path / "theirs.ckpt")]
    writer = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        partial = Path(writer.stdout.readline().strip())
        moved = tmp_path / partial.name.replace(".tmp-", ".old-")
        os.rename(tmp_path / "theirs.ckpt", moved)
        write(tmp_path / "mine.ckpt", 3)
        durable.sweep(tmp_path, "theirs.ckpt")
        assert sorted(os.listdir(tmp_path)) == sorted([partial.name, moved.name, "mine.ckpt"])
    finally:
        writer.kill()
        writer.communicate()
    durable.sweep(tmp_path, "mine.ckpt")
    assert sorted(os.listdir(tmp_path)) == ["mine.ckpt", "theirs.ckpt"]
    assert durable.verify(tmp_path / "theirs.ckpt") == 1


def test_what_another_machine_writes_is_swept_if_it_is_replaced_or_a_day_old(tmp_path):
    names = {name: f".{name}.ckpt.tmp-0123abcd-00000000-1-1" for name in ("mine", "fresh", "old")}
    for name in names.values():
        (tmp_path / name).mkdir()
    os.utime(tmp_path / names["old"], (1, 1))
    durable.sweep(tmp_path, "mine.ckpt")
    assert os.listdir(tmp_path) == [names["fresh"]]


def test_links_and_files_are_removed_and_replaced(tmp_path, monkeypatch):
    """`save_last="link"` makes links. Nothing that a link points to changes."""
    write(tmp_path / "a.ckpt", 1)
    for way in ("exchange", "renames", "removed alone"):
        for name, target in (("link.ckpt", "a.ckpt"), ("dangling.ckpt", "nowhere")):
            (tmp_path / name).symlink_to(target)
        (tmp_path / "file.ckpt").write_text("")
        for name in ("link.ckpt", "dangling.ckpt", "file.ckpt"):
            if way != "removed alone":
                write(tmp_path / name, 2)
                assert durable.verify(tmp_path / name) == 2, way
            durable.remove(tmp_path / name)
        monkeypatch.setattr(durable, "exchange", lambda one, other: False)
    assert os.listdir(tmp_path) == ["a.ckpt"] and durable.verify(tmp_path / "a.ckpt") == 1


def test_what_nfs_keeps_of_a_removed_file_does_not_break_a_checkpoint(tmp_path):
    write(tmp_path / "a.ckpt", 1)
    (tmp_path / "a.ckpt" / ".nfs000000000001").write_bytes(b"shard")
    assert durable.verify(tmp_path / "a.ckpt") == 1


def test_a_folder_that_cannot_be_removed_now_is_swept_later(tmp_path, monkeypatch):
    """NFS keeps files that a reader holds open. Rank 0 alone removes, so an error would leave the
    others waiting."""

    def not_empty(path, **_):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    write(tmp_path / "a.ckpt", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", not_empty)
        durable.remove(tmp_path / "a.ckpt")
    assert os.listdir(tmp_path) != [] and not list(tmp_path.glob("*.ckpt"))
    durable.sweep(tmp_path, "b.ckpt")
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_of_one_file_is_of_another_strategy(tmp_path):
    (tmp_path / "one.ckpt").write_bytes(b"PK")
    with pytest.raises(durable.BrokenCheckpoint, match="another strategy"):
        durable.verify(tmp_path / "one.ckpt")


@pytest.mark.parametrize("umask", [0o077, 0o022])
def test_a_replaced_file_has_the_rights_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "a") as partial:
            partial.unlink()  # as a writer does that renames a file of its own
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_share_of_the_files_is_read_and_all_sizes_are_compared(tmp_path, monkeypatch):
    """Ranks verify a checkpoint together: each file is read once."""
    for step in (1, 2):
        write(tmp_path / f"step={step}.ckpt", step)
    path, fingerprint, read = tmp_path / "step=2.ckpt", durable.fingerprint, []
    monkeypatch.setattr(
        durable, "fingerprint", lambda path: read.append(path.name) or fingerprint(path)
    )
    for rank in (0, 1):
        assert durable.verify(path, slice(rank, None, 2)) == 2
    assert sorted(read) == sorted(FILES)
    read.clear()
    os.truncate(path / "shard-2.safetensors", 5)
    with pytest.warns(UserWarning, match=r"passed over: .*shard-2\.safetensors is damaged"):
        assert durable.newest_good(tmp_path, share=durable.UNREAD).name == "step=1.ckpt"
    assert read == []


def test_sweeping_leaves_what_no_writer_has_named(tmp_path):
    mine = (
        ".notes.tmp-2024",
        ".my.old-drafts",
        ".a.ckpt.tmp-0123ABCD",
        ".a.ckpt.old-0123abcd9",
        ".tmp-0123abcd",
    )
    for name in mine:
        (tmp_path / name).mkdir()
    (tmp_path / ".a.txt.tmp-0123abcd").write_text("a file")
    (tmp_path / ".c.ckpt.tmp-0123abcd").symlink_to(tmp_path / mine[0])
    kept = sorted(os.listdir(tmp_path))
    (tmp_path / ".a.ckpt.tmp-0123abcd").mkdir()
    write(tmp_path / "b.ckpt", 1)
    os.rename(tmp_path / "b.ckpt", tmp_path / ".b.ckpt.old-0123abcd")
    durable.sweep(tmp_path, "a.ckpt")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, ".b.ckpt.old-0123abcd"])
    durable.sweep(tmp_path, "b.ckpt")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "b.ckpt"])

"""Work on checkpoint files, against `cp`, `cmp` and `dd`, and against what people do today.

    python benchmarks/files.py                  # everything; needs TensorFlow and 15 GB of disk
    python benchmarks/files.py inspect verify   # some jobs
    python benchmarks/files.py --scale 0.01     # the same on a hundredth of the bytes

Real TensorFlow 1.15.5 takes part where COMPAT_RESTORE_TF1_PYTHON names an interpreter that has it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from measure import Command, compare

from compat_restore.checkpoint.bundle_writer import BundleWriter
from compat_restore.checkpoint.writer import Content
from compat_restore.tensors import DType

PEERS = str(Path(__file__).with_name("peers.py"))
# compat-restore as its users start it, without the cost of finding out what that is.
OURS = [sys.executable, "-m", "compat_restore"]
# As BERT's: many small tensors, some large; two slots of Adam each. About 4 GB, a third of it kept.
LENGTHS = (100, 2_000, 300_000, 1_500_000, 2_380_000)
CONVERT = ["--drop-slots", "--rename", r"bert/(.*)=model/\1"]


class Files:
    """The checkpoints that are worked on, made when they are first needed."""

    def __init__(self, folder: Path, scale: float) -> None:
        self.folder, self.scale = folder, scale

    def large(self) -> str:
        """1,200 tensors, 400 of which are weights, 4 GB."""
        return self._made("large", 400, LENGTHS)

    def small(self) -> str:
        """20,000 small variables, half of which are slots."""
        return self._made("small", 10_000, (8, 16, 24), slots=1)

    def medium(self) -> str:
        """270 tensors, 90 of which are weights, 100 MB."""
        return self._made("medium", 90, (100, 2_000, 100_000, 180_000))

    def _made(self, name: str, weights: int, lengths: tuple[int, ...], slots: int = 2) -> str:
        prefix = str(self.folder / name)
        if os.path.exists(f"{prefix}.index"):
            return prefix
        values = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32)
        contents = []
        for number in range(weights):
            length = max(1, int(lengths[number % 16 % len(lengths)] * self.scale))
            for slot, suffix in enumerate(("", "/adam_m", "/adam_v")[: slots + 1]):
                start = (number * 7 + slot) % 1000
                contents.append(
                    Content(
                        name=f"bert/encoder/layer_{number // 16}/part_{number % 16}/w{suffix}",
                        dtype=DType.float32,
                        shape=(length,),
                        read=partial(values.__getitem__, slice(start, start + length)),
                    )
                )
        with BundleWriter(prefix) as writer:
            writer.write(contents)
            writer.finish()
        return prefix

    def kept_bytes(self, prefix: str) -> str:
        """A plain file of as many bytes as the weights of a checkpoint take."""
        from compat_restore import open_checkpoint

        path = f"{prefix}.kept"
        if not os.path.exists(path):
            with open_checkpoint(prefix) as reader, open(path, "wb") as file:
                for name in reader.specs():
                    if not name.endswith(("/adam_m", "/adam_v")):
                        file.write(reader.read(name).tobytes())
        return path

    def output(self, name: str) -> tuple[str, partial[None]]:
        """A name for an output, and what removes it and all its files."""
        path = self.folder / "out" / name
        return str(path), partial(shutil.rmtree, path.parent, ignore_errors=True)


def peer(*words: str) -> list[str]:
    return [sys.executable, PEERS, *words]


def inspect(files: Files, options: argparse.Namespace) -> None:
    for label, prefix in (("1,200", files.large()), ("20,000", files.small())):
        peers = [Command("TensorFlow 2", peer("list_variables", prefix))]
        tf1 = os.environ.get("COMPAT_RESTORE_TF1_PYTHON")
        if tf1:
            peers.append(Command("TensorFlow 1.15", [tf1, PEERS, "list_variables", prefix]))
        show(
            f"inspect, {label} entries",
            Command("inspect", [*OURS, "inspect", prefix]),
            peers,
            options,
        )


def convert(files: Files, options: argparse.Namespace) -> None:
    for label, prefix in (("large", files.large()), ("medium", files.medium())):
        kept = files.kept_bytes(prefix)
        for suffix, job in (("", "save_v2"), (".safetensors", "to_safetensors")):
            out, clean = files.output(f"new{suffix}")
            made = partial(_made_anew, clean, out)
            peers = [Command("cp of the kept bytes", ["cp", kept, out], made)]
            if not options.physical:
                peers.append(Command(f"TensorFlow 2, {job}", peer(job, prefix, out), made))
            if options.saver and not suffix:
                peers.append(Command("TensorFlow 2, Saver", peer("saver", prefix, out), made))
            show(
                f"filter, rename, verify: {label}{suffix and ' to'} {suffix}",
                Command("convert", [*OURS, "convert", prefix, out, *CONVERT], made),
                peers,
                options,
            )
        clean()


def cold(files: Files, options: argparse.Namespace) -> None:
    prefix = files.large()
    kept = files.kept_bytes(prefix)
    out, clean = files.output("new")

    def forgotten(path: str) -> None:
        _made_anew(clean, out)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)

    data = f"{prefix}.data-00000-of-00001"
    show(
        "filter, rename, verify: large, not in the cache",
        Command("convert", [*OURS, "convert", prefix, out, *CONVERT], partial(forgotten, data)),
        [Command("cp of the kept bytes", ["cp", kept, out], partial(forgotten, kept))],
        options,
    )
    clean()


def small(files: Files, options: argparse.Namespace) -> None:
    prefix = files.small()
    out, clean = files.output("new")
    made = partial(_made_anew, clean, out)
    show(
        "20,000 small variables, keep half",
        Command("convert", [*OURS, "convert", prefix, out, *CONVERT], made),
        [Command("TensorFlow 2, save_v2", peer("save_v2", prefix, out), made)],
        options,
    )
    clean()


def verify(files: Files, options: argparse.Namespace) -> None:
    prefix = files.large()
    data = f"{prefix}.data-00000-of-00001"
    show(
        "verify, 4 GB",
        Command("verify", [*OURS, "verify", prefix]),
        [Command("dd to null", ["dd", f"if={data}", "of=/dev/null", "bs=1M", "status=none"])],
        options,
    )


def diff(files: Files, options: argparse.Namespace) -> None:
    prefix = files.large()
    pair = [str(files.folder / name) for name in ("first", "second")]
    for path in pair:
        if not os.path.exists(f"{path}.index"):
            from compat_restore import Rules
            from compat_restore import convert as convert_checkpoint

            convert_checkpoint(prefix, path, Rules(drop_slots=True))
    data = [f"{path}.data-00000-of-00001" for path in pair]
    peers = [Command("cmp", ["cmp", *data])]
    if not options.physical:
        peers.append(Command("TensorFlow 2", peer("compare", *pair)))
    show("byte diff, 1.3 GB each", Command("diff", [*OURS, "diff", *pair]), peers, options)


def _made_anew(clean: partial[None], path: str) -> None:
    clean()
    os.makedirs(os.path.dirname(path))
    os.sync()  # what the run before left to write is not this one's


def show(title: str, ours: Command, peers: list[Command], options: argparse.Namespace) -> None:
    sys.stdout.write(f"\n## {title}\n\n{compare(ours, peers, options.runs)}\n")
    sys.stdout.flush()


JOBS = {job.__name__: job for job in (inspect, convert, cold, small, verify, diff)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*", help=", ".join(JOBS))
    parser.add_argument("--runs", type=int, default=7, help="pairs that count")
    parser.add_argument("--scale", type=float, default=1.0, help="of the tensors' lengths")
    parser.add_argument("--directory", help="where to keep the files; a temporary one if not given")
    parser.add_argument("--physical", action="store_true", help="against cp, cmp and dd alone")
    parser.add_argument("--saver", action="store_true", help="the Saver recipe too: minutes, 16 GB")
    options = parser.parse_args()
    if unknown := set(options.jobs) - set(JOBS):
        parser.error(f"no job {', '.join(sorted(unknown))}; jobs: {', '.join(JOBS)}")
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        folder = Path(options.directory or temporary)
        for name in options.jobs or JOBS:
            JOBS[name](Files(folder, options.scale), options)


if __name__ == "__main__":
    main()

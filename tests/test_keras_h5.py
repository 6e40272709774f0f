from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from formats import rows_of, snapshot

from compat_restore import convert, open_checkpoint
from compat_restore.checkpoint.keras_archive import KerasArchive
from compat_restore.checkpoint.keras_h5 import KerasH5Reader, KerasH5Writer
from compat_restore.checkpoint.writer import Content
from compat_restore.cli import main
from compat_restore.errors import (
    CheckpointFormatError,
    CompatRestoreError,
    DamagedCheckpointError,
    DamagedTensorsError,
    OutputError,
    TensorNotFoundError,
    UsageError,
)
from compat_restore.names import RoleKind
from compat_restore.tensors import DType

WEIGHTS = "model.weights.h5"
# (file, who wrote it), where the file tells the names of the variables
NAMED = [
    ("keras.keras", "keras"),
    ("keras.weights.h5", "keras"),
    ("keras_model.h5", "keras"),
    ("tf_keras.keras", "tf_keras"),
    ("tf_keras_model.h5", "tf_keras"),
    ("tf_keras_weights.h5", "tf_keras"),
]
ALL = [name for name, _ in NAMED] + ["tf_keras.weights.h5"]


@pytest.fixture
def files(golden):
    return golden / "keras"


@pytest.fixture
def h5py():
    return pytest.importorskip("h5py")


def content_of(reader, name, array):
    spec = reader.specs()[reader.key_of(name)]
    return Content.of(spec.name, spec.dtype, np.asarray(array))


def filled(template, path, arrays, **options):
    """Fill a template with arrays by name; return the new file's path."""
    with KerasH5Reader(str(template)) as reader:
        contents = [content_of(reader, name, array) for name, array in arrays.items()]
        with KerasH5Writer(str(path), reader, **options) as writer:
            writer.write(contents)
            for content in contents:
                found = writer.read_back(content.name)
                assert found.tobytes() == content.read().tobytes()
            assert not os.path.exists(path) or options
            writer.finish()
    return path


def archive_of(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


# -- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "which"), NAMED)
def test_weights_have_the_names_and_the_bytes_that_the_model_had(files, name, which):
    truth = json.loads((files / "truth.json").read_text())[which]
    with open_checkpoint(files / name) as reader:
        roles = reader.roles()
        weights = {n for n, role in roles.items() if role.kind is RoleKind.VARIABLE}
        assert weights == set(truth)
        for variable, row in truth.items():
            spec = reader.variables()[variable]
            array = reader.read(variable)
            assert [spec.dtype.value, list(spec.known_shape)] == [row["dtype"], row["shape"]]
            assert hashlib.sha1(array.tobytes()).hexdigest() == row["sha1"]
            (place,) = reader.stored(variable)
            assert place.source.read(place.offset, place.size) == array.tobytes()
            assert place.checksum is None
            assert spec.full_name == variable
            assert reader.read(reader.key_of(variable)).tobytes() == array.tobytes()


def test_places_stand_for_names_where_the_file_tells_none(files):
    truth = json.loads((files / "truth.json").read_text())["tf_keras"]
    with open_checkpoint(files / "tf_keras.weights.h5") as reader:
        weights = [n for n, r in reader.roles().items() if r.kind is RoleKind.VARIABLE]
        inner = "layers/sequential/layers/sequential/layers"
        assert sorted(weights) == [
            "layers/dense/vars/0",
            "layers/dense/vars/1",
            *(f"{inner}/batch_normalization/vars/{number}" for number in range(4)),
            f"{inner}/dense/vars/0",
            f"{inner}/dense/vars/1",
        ]
        found = hashlib.sha1(reader.read(f"{inner}/dense/vars/0").tobytes()).hexdigest()
        assert found == truth["fc/kernel"]["sha1"]


@pytest.mark.parametrize("name", ALL)
def test_optimizers_metrics_and_counters_are_told_from_weights(files, name):
    with open_checkpoint(files / name) as reader:
        roles = reader.roles()
        for variable, role in roles.items():
            key = reader.key_of(variable)
            if key.startswith(("optimizer", "metrics")):
                scalar = reader.specs()[key].shape == ()
                assert role.kind is (RoleKind.BOOKKEEPING if scalar else RoleKind.SLOT)
            else:
                assert role.kind is RoleKind.VARIABLE


def test_slots_of_legacy_files_know_their_owners(files):
    with open_checkpoint(files / "tf_keras_model.h5") as reader:
        role = reader.roles()["Adam/m/fc/kernel"]
        assert (role.kind, role.owner, role.slot) == (RoleKind.SLOT, "fc/kernel", "m")
    with open_checkpoint(files / "keras_model.h5") as reader:
        role = reader.roles()["adam/tower_sequential_fc_kernel_velocity"]
        assert (role.owner, role.slot) == ("tower/sequential/fc/kernel", "velocity")


def test_a_variable_also_goes_by_the_names_of_models(files):
    with open_checkpoint(files / "keras.keras") as reader:
        assert reader.variables()["head/kernel"].aliases == ("net/head/kernel",)
    with open_checkpoint(files / "tf_keras.keras") as reader:
        assert "tower/sequential/fc/kernel" in reader.variables()["fc/kernel"].aliases


def test_a_missing_tensor_is_told_with_the_nearest_names(files):
    with (
        open_checkpoint(files / "keras.keras") as reader,
        pytest.raises(TensorNotFoundError, match="head/kernel"),
    ):
        reader.read("head/kernels")


def test_a_closed_reader_says_so(files):
    for name in ("keras.keras", "keras.weights.h5"):
        with open_checkpoint(files / name) as reader:
            assert reader.files() == (str(files / name),)
        with pytest.raises(UsageError, match="closed"):
            reader.read("head/kernel")


def test_h5py_is_not_needed(files):
    code = (
        "import sys; sys.modules['h5py'] = None\n"
        "from compat_restore import open_checkpoint\n"
        f"with open_checkpoint({str(files / 'keras.keras')!r}) as reader:\n"
        "    print(reader.read('head/kernel').shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(3, 2)\n"


def test_two_weights_of_one_name_keep_their_keys(tmp_path, h5py):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"one", b"two"]
        for layer in ("one", "two"):
            file[f"{layer}/kernel:0"] = np.full(2, len(layer), np.float32)
            file[layer].attrs["weight_names"] = [b"kernel:0"]
        file["two/bias:0"] = np.zeros(1, np.float32)
    with open_checkpoint(path) as reader:
        assert list(reader.variables()) == ["one/kernel:0", "two/bias:0", "two/kernel:0"]


def test_names_in_pieces_are_joined(tmp_path, h5py):
    path = tmp_path / "x.h5"
    names = [f"weight_{number:03}:0" for number in range(30)]
    with h5py.File(path, "w") as file:
        for part in range(3):
            file.attrs[f"layer_names{part}"] = [f"layer{part}".encode()]
            layer = file.create_group(f"layer{part}")
            for piece in range(2):
                mine = names[10 * part + 5 * piece :][:5]
                layer.attrs[f"weight_names{piece}"] = [name.encode() for name in mine]
                for name in mine:
                    layer[name] = np.zeros(1)
    with open_checkpoint(path) as reader:
        assert list(reader.variables()) == [name.removesuffix(":0") for name in names]


def test_a_weight_that_is_listed_and_missing_is_damage(tmp_path, h5py):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"one", b"two"]
        file.create_group("one").attrs["weight_names"] = [b"kernel:0"]
    with pytest.raises(DamagedCheckpointError, match="'one/kernel:0', 'two'"):
        open_checkpoint(path)


def test_hdf5_that_keras_did_not_write_is_read_by_paths(tmp_path, h5py):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["net/w"] = np.arange(3)
        file["names"] = ["a", "b"]
    with open_checkpoint(path) as reader:
        assert reader.format == "HDF5, not by Keras"
        assert reader.read("net/w").tolist() == [0, 1, 2]
        assert reader.read("names").tolist() == [b"a", b"b"]
        assert reader.stored("names") == ()
        reader.verify(reader.specs())
    with h5py.File(tmp_path / "empty.h5", "w"):
        pass
    with pytest.raises(CheckpointFormatError, match="without any dataset"):
        open_checkpoint(tmp_path / "empty.h5")


def test_files_are_known_by_what_they_hold_whatever_they_are_called(tmp_path, files, h5py):
    for name in ("keras.keras", "keras.weights.h5"):
        path = tmp_path / f"{name}.bin"
        shutil.copy(files / name, path)
        with open_checkpoint(path) as reader:
            assert "head/kernel" in reader.variables()
    with h5py.File(tmp_path / "block.h5", "w", userblock_size=512) as file:
        file["w"] = np.zeros(1)
    with open_checkpoint(tmp_path / "block.h5") as reader:
        assert list(reader.specs()) == ["w"]


# -- .keras archives ------------------------------------------------------------------------------


def test_packed_weights_are_unpacked(tmp_path, files):
    members = members_of(files / "keras.keras")
    path = archive_of(tmp_path / "x.keras", members.items(), zipfile.ZIP_DEFLATED)
    with open_checkpoint(files / "keras.keras") as stored, open_checkpoint(path) as packed:
        assert rows_of(packed) == rows_of(stored)
        packed.verify(packed.specs())
    assert os.listdir(tmp_path) == ["x.keras"]


def test_the_archives_checksum_is_checked_by_verify(tmp_path, files):
    data = bytearray((files / "keras.keras").read_bytes())
    with open_checkpoint(files / "keras.keras") as reader:
        (place,) = reader.stored("head/kernel")
        reader.verify(["head/kernel"])
    data[place.offset] ^= 1
    path = tmp_path / "x.keras"
    path.write_bytes(data)
    with (
        open_checkpoint(path) as reader,
        pytest.raises(DamagedCheckpointError, match="checksum of"),
    ):
        reader.verify(["head/kernel"])


def damaged_archive(files, path, name="head/kernel"):
    """Write an archive in which one bit of a weight is not as it was."""
    data = bytearray((files / "keras.keras").read_bytes())
    with open_checkpoint(files / "keras.keras") as reader:
        (place,) = reader.stored(name)
    data[place.offset] ^= 1
    path.write_bytes(data)
    return path


def test_no_value_of_a_damaged_archive_is_read_or_given_out_for_copying(tmp_path, files):
    path = damaged_archive(files, tmp_path / "x.keras")
    with open_checkpoint(path) as reader:
        assert "head/kernel" in reader.variables()
        for use in (reader.read, reader.stored, lambda name: reader.verify([name])):
            for name in ("head/kernel", "head/bias"):  # none can be told from the others
                with pytest.raises(DamagedCheckpointError, match="checksum of"):
                    use(name)


@pytest.mark.parametrize("output", ["x.ckpt", "x.safetensors", "x.npz", "x.keras"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_damaged_archive_is_not_converted(tmp_path, files, output, verify):
    path = damaged_archive(files, tmp_path / "damaged.keras")
    into = files / "keras.keras" if output == "x.keras" else None
    with pytest.raises(DamagedCheckpointError, match="checksum of"):
        convert(path, tmp_path / output, into=into, verify=verify)
    assert os.listdir(tmp_path) == ["damaged.keras"]


def test_a_damaged_archive_is_told_once_and_not_for_each_of_its_tensors(tmp_path, files):
    path = damaged_archive(files, tmp_path / "damaged.keras")
    with pytest.raises(DamagedCheckpointError) as caught:
        convert(path, tmp_path / "x.ckpt")
    assert str(caught.value).count("is damaged") == 1


def test_the_checksum_of_an_archive_is_computed_once_an_opening(files, monkeypatch):
    passes = []
    chunks = KerasArchive.chunks
    monkeypatch.setattr(KerasArchive, "chunks", lambda self: passes.append(0) or chunks(self))
    with open_checkpoint(files / "keras.keras") as reader:
        assert passes == []
        for name in reader.variables():
            reader.read(name)
            reader.stored(name)
        assert passes == [0]


def test_a_plain_file_says_that_it_has_no_checksums_and_an_archive_has_one(files, capsys):
    for name in ALL:
        with open_checkpoint(files / name) as reader:
            archive = name.endswith(".keras")
            assert reader.has_checksums is archive
            assert any("no checksums" in note for note in reader.notes) is not archive
        assert main(["verify", str(files / name)]) == 0
        told = "all as they were written" if archive else "this format has no checksums"
        assert told in capsys.readouterr().out


@pytest.mark.parametrize("config", [b"", b"{", b"[" * 100_000, b'{"config": {"layers": [[1]]}}'])
def test_a_configuration_that_is_not_understood_leaves_the_places(tmp_path, files, config):
    members = members_of(files / "tf_keras.keras") | {"config.json": config}
    with open_checkpoint(archive_of(tmp_path / "x.keras", members.items())) as reader:
        assert "layers/dense/vars/0" in reader.variables()


def test_archives_without_one_file_of_weights_are_told(tmp_path, files):
    weights = members_of(files / "keras.keras")[WEIGHTS]
    path = archive_of(tmp_path / "a.keras", [("model.weights.npz", b"")])
    with pytest.raises(CheckpointFormatError, match=r"model\.weights\.npz"):
        open_checkpoint(path)
    with pytest.warns(UserWarning, match="Duplicate"):
        path = archive_of(tmp_path / "b.keras", [(WEIGHTS, weights), (WEIGHTS, weights)])
    with pytest.raises(DamagedCheckpointError, match="2 files"):
        open_checkpoint(path)
    path = archive_of(tmp_path / "c.keras", [(WEIGHTS, b"not HDF5" * 100)])
    with pytest.raises(CheckpointFormatError, match="no HDF5"):
        open_checkpoint(path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, files):
    weights = members_of(files / "keras.keras")[WEIGHTS]
    path = archive_of(tmp_path / "x.keras", [(WEIGHTS, weights)], zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    size = len(weights).to_bytes(4, "little")
    path.write_bytes(data.replace(size, (1 << 30).to_bytes(4, "little")))
    with pytest.raises(DamagedCheckpointError, match="claims 1073741824 bytes"):
        open_checkpoint(path)


def test_every_truncation_of_an_archive_is_told(tmp_path, files):
    data = (files / "keras.keras").read_bytes()
    path = tmp_path / "x.keras"
    for length in [0, 1, 2, 10, *range(100, len(data), 997), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises((DamagedCheckpointError, CheckpointFormatError)):
            open_checkpoint(path)


def test_changed_archives_make_nothing_but_documented_errors(tmp_path, files):
    data = (files / "keras.keras").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        begin = archive.start_dir
    path = tmp_path / "x.keras"
    for seed in range(400):
        chance = random.Random(seed)
        changed = bytearray(data)
        ends = (0, 300) if seed % 2 else (begin, len(data))
        for _ in range(chance.choice((1, 2, 4))):
            changed[chance.randrange(*ends)] = chance.randrange(256)
        path.write_bytes(changed)
        try:
            with KerasH5Reader(str(path)) as reader:
                reader.verify(reader.specs())
        except (CheckpointFormatError, DamagedCheckpointError):
            pass


# -- filling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_template_is_filled_and_nothing_else_in_it_changes(tmp_path, files, name):
    template = files / name
    before = template.read_bytes()
    kernel = "layers/dense/vars/0" if name == "tf_keras.weights.h5" else "head/kernel"
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    path = filled(template, tmp_path / name, {kernel: values})
    assert template.read_bytes() == before
    with open_checkpoint(path) as new, open_checkpoint(template) as old:
        assert new.read(kernel).tolist() == values.tolist()
        key = new.key_of(kernel)
        rows, old_rows = rows_of(new), rows_of(old)
        assert rows.pop(key) != old_rows.pop(key)
        assert rows == old_rows
        assert list(new.variables()) == list(old.variables())
        new.verify(new.specs())
    if name.endswith(".keras"):
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(template) as theirs:
            assert archive.testzip() is None
            for info, other in zip(archive.infolist(), theirs.infolist(), strict=True):
                assert (info.filename, info.date_time) == (other.filename, other.date_time)
                assert info.external_attr == other.external_attr
        new_members, old_members = members_of(path), members_of(template)
        assert len(new_members.pop(WEIGHTS)) == len(old_members.pop(WEIGHTS))
        assert new_members == old_members
    else:
        assert len(path.read_bytes()) == len(before)
        assert sum(a != b for a, b in zip(path.read_bytes(), before, strict=True)) <= 24


def test_stored_pieces_are_copied_one_after_another(tmp_path, files):
    template = files / "keras.weights.h5"
    with KerasH5Reader(str(template)) as reader, KerasH5Reader(str(template)) as source:
        (place,) = source.stored("tower/sequential/fc/kernel")

        pieces = (
            place._replace(offset=place.offset + 24, size=24),
            place._replace(size=24),
        )
        spec = reader.variables()["tower/sequential/fc/kernel"]
        content = Content(
            name=reader.key_of(spec.name),
            dtype=spec.dtype,
            shape=spec.known_shape,
            read=lambda: pytest.fail("values were decoded"),
            stored=pieces,
        )
        with KerasH5Writer(str(tmp_path / "x.weights.h5"), reader) as writer:
            writer.write([content])
            found = writer.read_back(content.name)
            old = source.read(spec.name)
            assert found.tolist() == [*old[2:].tolist(), *old[:2].tolist()]


def test_big_endian_places_are_filled_with_big_endian_values(tmp_path, h5py):
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file["w"] = np.zeros(3, ">f4")
    filled(tmp_path / "t.h5", tmp_path / "x.h5", {"w": np.array([1, 2, 3], np.float32)})
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["w"].dtype == ">f4"
        assert file["w"][()].tolist() == [1, 2, 3]


def test_packed_templates_are_filled_and_written_unpacked(tmp_path, files):
    members = members_of(files / "keras.keras") | {"assets/words.txt": b"a\nb\n" * 1000}
    template = archive_of(tmp_path / "t.keras", members.items(), zipfile.ZIP_DEFLATED)
    path = filled(template, tmp_path / "x.keras", {"head/bias": np.ones(2, np.float32)})
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo(WEIGHTS).compress_type == zipfile.ZIP_STORED
        assert archive.getinfo("assets/words.txt").compress_type == zipfile.ZIP_DEFLATED
        assert archive.testzip() is None
    assert {**members_of(path), WEIGHTS: b""} == {**members, WEIGHTS: b""}
    with open_checkpoint(path) as reader:
        assert reader.read("head/bias").tolist() == [1, 1]


def test_a_template_whose_weights_are_damaged_is_refused_and_nothing_is_put_in_place(
    tmp_path, files
):
    template = damaged_archive(files, tmp_path / "template.keras", "head/bias")
    with pytest.raises(DamagedCheckpointError, match=r"template\.keras' is damaged: the checksum"):
        filled(template, tmp_path / "x.keras", {"head/kernel": np.ones((3, 2), np.float32)})
    rules = {"head/kernel": "head/kernel"}
    with pytest.raises(DamagedCheckpointError, match=r"template\.keras' is damaged: the checksum"):
        convert(files / "keras.keras", tmp_path / "x.keras", rules, into=template)
    assert os.listdir(tmp_path) == ["template.keras"]


@pytest.mark.parametrize("member", ["config.json", "metadata.json", "assets/words.txt", WEIGHTS])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_template_with_a_damaged_member_is_told_once_and_leaves_nothing(
    tmp_path, files, monkeypatch, member, compression
):
    members = members_of(files / "keras.keras") | {"assets/words.txt": b"a\nb\n" * 1000}
    path = archive_of(tmp_path / "t.keras", members.items(), compression)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
    data = bytearray(path.read_bytes())
    data[info.header_offset + 30 + len(member) + info.compress_size // 2] ^= 0x55
    path.write_bytes(data)
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    with pytest.raises(DamagedCheckpointError, match=r"t\.keras' is damaged"):
        filled(path, tmp_path / "x.keras", {"head/bias": np.ones(2, np.float32)})
    gc.collect()
    assert ignored == []
    assert os.listdir(tmp_path) == ["t.keras"]


def test_all_damaged_tensors_are_listed_be_they_copied_or_decoded(tmp_path, files):
    def damaged(name):
        def read():
            raise DamagedCheckpointError(f"tensor '{name}' is damaged")

        return read

    with KerasH5Reader(str(files / "keras.weights.h5")) as reader:
        contents = []
        for name in ("head/kernel", "head/bias", "tower/sequential/fc/kernel"):
            spec = reader.specs()[reader.key_of(name)]
            (place,) = reader.stored(name)
            contents.append(
                Content(
                    name=spec.name,
                    dtype=spec.dtype,
                    shape=spec.known_shape,
                    read=damaged(name),
                    stored=(place._replace(checksum=1),) if name == "head/bias" else (),
                )
            )
        with (
            KerasH5Writer(str(tmp_path / "x.weights.h5"), reader) as writer,
            pytest.raises(DamagedTensorsError) as caught,
        ):
            writer.write(contents)
    assert len(caught.value.faults) == 3
    assert os.listdir(tmp_path) == []


def test_thousands_of_datasets_are_set_in_no_time(tmp_path, h5py):
    names = [f"w{number}" for number in range(4000)]
    with h5py.File(tmp_path / "t.h5", "w") as file:
        for name in names:
            file[name] = np.zeros(1, np.float32)
    with KerasH5Reader(str(tmp_path / "t.h5")) as reader:
        contents = [Content.of(n, DType.float32, np.ones(1, np.float32)) for n in names]
        with KerasH5Writer(str(tmp_path / "x.h5"), reader) as writer:
            begin = time.process_time()
            writer.write(
                [content._replace(stored=reader.stored(content.name)) for content in contents]
            )
            assert time.process_time() - begin < 3


def test_everything_that_does_not_fit_is_listed_and_nothing_is_written(tmp_path, files):
    with KerasH5Reader(str(files / "keras.weights.h5")) as reader:
        key = reader.key_of("head/kernel")
        contents = [
            Content.of(key, DType.float32, np.zeros((2, 3), np.float32)),
            Content.of(reader.key_of("head/bias"), DType.float64, np.zeros(2)),
            Content.of("nowhere", DType.float32, np.zeros(1, np.float32)),
            Content.of(key, DType.float32, np.zeros((3, 2), np.float32)),
        ]
        with (
            KerasH5Writer(str(tmp_path / "x.weights.h5"), reader) as writer,
            pytest.raises(UsageError) as caught,
        ):
            writer.write(contents)
    message = str(caught.value)
    for part in ("float32[2,3]", "float64[2]", "'nowhere' has no place", "given twice"):
        assert part in message
    assert snapshot(tmp_path) == {}


def test_datasets_in_chunks_cannot_be_set(tmp_path, h5py):
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file.create_dataset("w", data=np.zeros(3), compression="gzip")
        file["b"] = np.zeros(3)
    with pytest.raises(UsageError, match="in chunks"):
        filled(tmp_path / "t.h5", tmp_path / "x.h5", {"w": np.zeros(3)})
    filled(tmp_path / "t.h5", tmp_path / "x.h5", {"b": np.ones(3)})
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["w"][()].tolist() == [0, 0, 0]
        assert file["b"][()].tolist() == [1, 1, 1]


def test_a_template_whose_dataset_stands_in_its_own_description_is_damage(tmp_path, h5py):
    path = tmp_path / "t.h5"
    with h5py.File(path, "w") as file:
        file["a"] = np.zeros(30, np.float32)
        file["b"] = np.zeros(30, np.float32)
        place = file["a"].id.get_offset()
        header = h5py.h5o.get_info(file["b"].id).addr
    data = path.read_bytes()
    old = place.to_bytes(8, "little") + (120).to_bytes(8, "little")
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, header.to_bytes(8, "little") + old[8:]))
    with pytest.raises(DamagedCheckpointError):
        filled(path, tmp_path / "x.h5", {"a": np.ones(30, np.float32)})
    assert sorted(os.listdir(tmp_path)) == ["t.h5"]


def test_a_file_that_is_there_is_refused_or_replaced_in_one_moment(tmp_path, files):
    template, path = files / "keras.weights.h5", tmp_path / "x.weights.h5"
    values = {"head/bias": np.ones(2, np.float32)}
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        filled(template, path, values)
    assert path.read_bytes() == b"mine"
    filled(template, path, values, overwrite=True)
    with open_checkpoint(path) as reader:
        assert reader.read("head/bias").tolist() == [1, 1]
    assert os.listdir(tmp_path) == ["x.weights.h5"]


def test_names_that_no_such_file_can_have_are_refused(tmp_path, files):
    values = {"head/bias": np.ones(2, np.float32)}
    with pytest.raises(OutputError, match="a directory"):
        filled(files / "keras.weights.h5", tmp_path, values, overwrite=True)
    with pytest.raises(UsageError, match="same ending"):
        filled(files / "keras.weights.h5", tmp_path / "x.keras", values)
    with pytest.raises(UsageError, match="same ending"):
        filled(files / "keras.keras", tmp_path / "x.weights.h5", values)
    copy = tmp_path / "t.weights.h5"
    shutil.copy(files / "keras.weights.h5", copy)
    with pytest.raises(UsageError, match="never written"):
        filled(copy, copy, values, overwrite=True)
    assert copy.read_bytes() == (files / "keras.weights.h5").read_bytes()


@pytest.mark.parametrize("name", ["keras.keras", "keras.weights.h5"])
def test_leaving_without_finish_leaves_nothing(tmp_path, files, name):
    with (
        KerasH5Reader(str(files / name)) as reader,
        KerasH5Writer(str(tmp_path / "new" / name), reader) as writer,
    ):
        writer.write(())
    assert os.listdir(tmp_path) == []


def test_convert_fills_a_keras_file_by_names_from_a_tf1_checkpoint(tmp_path, files):
    """The way of most people: a name-based checkpoint into the file of a fresh model."""
    fresh = files / "keras.weights.h5"
    with open_checkpoint(fresh) as reader:
        names = [n for n, r in reader.roles().items() if r.kind is RoleKind.VARIABLE]
        source = tmp_path / "tf1" / "model.ckpt"
        convert(fresh, source, {name: f"net/{name}" for name in names})
    out = tmp_path / "out.weights.h5"
    report = convert(source, out, {f"net/{name}": name for name in names}, into=fresh)
    assert {restored.item.target for restored in report.restored} == set(names)
    assert out.read_bytes() == fresh.read_bytes()


@pytest.mark.parametrize("name", ["keras.keras", "keras.weights.h5"])
def test_files_at_urls_are_read_and_filled(files, name):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    with memory.open(f"/keras/{name}", "wb") as file:
        file.write((files / name).read_bytes())
    values = {"head/bias": np.ones(2, np.float32)}
    path = filled(f"memory://keras/{name}", f"memory://keras/new.{name}", values)
    with open_checkpoint(path) as reader:
        assert reader.read("head/bias").tolist() == [1, 1]
    memory.rm("/keras", recursive=True)


# -- held against Keras ---------------------------------------------------------------------------

_MODELS = """
import os, sys
which, folder = sys.argv[1:3]
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
if which == "tf_keras":
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    import tf_keras as keras
else:
    import keras
import numpy as np
L = keras.layers

def images():
    return keras.Sequential([
        keras.Input((8, 8, 3)), L.Conv2D(4, 3, name="conv1"), L.BatchNormalization(),
        L.DepthwiseConv2D(3), L.SeparableConv2D(4, 3, use_bias=False), L.PReLU(),
        L.Conv2DTranspose(2, 3), L.BatchNormalization(center=False, name="bn"), L.Flatten(),
        L.Dropout(0.5), L.Dense(3), L.Dense(3, name="head", use_bias=False)], name="images")

def words():
    start = keras.Input((6,))
    x = L.Embedding(10, 4, name="emb")(start)
    x = L.Conv1D(4, 2, name="wide")(x)
    heads = L.MultiHeadAttention(2, 3, name="att")(x, x)
    x = L.LayerNormalization(name="ln")(L.Add()([x, heads]))
    parts = [L.LSTM(5)(x), L.GRU(5, name="g")(x), L.SimpleRNN(2, use_bias=False)(x),
             L.Bidirectional(L.LSTM(3), name="both")(x)]
    x = L.LayerNormalization(scale=False)(L.Concatenate()(parts))
    inner = keras.Sequential([L.Dense(4, name="in1"), L.BatchNormalization(scale=False)],
                             name="inner")
    return keras.Model(start, L.Dense(2, name="out")(inner(x)), name="words")

@keras.saving.register_keras_serializable("test")
class Block(L.Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.first = L.Dense(4)
        self.more = [L.Dense(2, name="x"), L.Dense(2)]
    def build(self, shape):
        self.first.build((None, 4))
        for layer in self.more:
            layer.build((None, 4))
        self.scale = self.add_weight(shape=(2,), name="scale")
        self.built = True
    def call(self, x):
        x = self.first(x)
        return self.more[0](x) + self.more[1](x) * self.scale

@keras.saving.register_keras_serializable("test")
class Sub(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.block = Block()
        self.drop = L.Dropout(0.2)
        self.dense = L.Dense(4)
    def call(self, x):
        return self.block(self.dense(self.drop(x)))

def classes():
    model = Sub(name="sub")
    model(np.zeros((2, 4), "float32"))
    return model

MAKERS = {"images": images, "words": words, "classes": classes}
INPUTS = {"images": np.zeros((2, 8, 8, 3), "float32"), "words": np.zeros((2, 6), "int32"),
          "classes": np.zeros((2, 4), "float32")}

def fresh(name):
    keras.backend.clear_session()
    model = MAKERS[name]()
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model

def names(model):
    return [getattr(v, "path", v.name).removesuffix(":0") for v in model.weights]
"""

_SAVE = """
random = np.random.default_rng(3)
for name in MAKERS:
    model = fresh(name)
    for kind, save in ((".weights.h5", model.save_weights), (".keras", model.save),
                       (".h5", model.save)):
        if (which, name, kind) == ("tf_keras", "classes", ".h5"):
            continue  # that is more than tf_keras can
        save(f"{folder}/fresh_{name}{kind}")
    model.set_weights([random.standard_normal(w.shape).astype(w.dtype) for w in
                       model.get_weights()])
    for fresh_file in list(os.listdir(folder)):
        if fresh_file.startswith(f"fresh_{name}."):
            full = f"{folder}/full_{fresh_file.removeprefix('fresh_')}"
            (model.save_weights if ".weights." in full else model.save)(full)
    np.savez(f"{folder}/{name}.npz", names=names(model), **{str(n): w for n, w in
             enumerate(model.get_weights())})
"""

_LOAD = """
for name in MAKERS:
    values = np.load(f"{folder}/{name}.npz")
    model = fresh(name)
    for kind in (".weights.h5", ".keras", ".h5"):
        path = f"{folder}/filled_{name}{kind}"
        if not os.path.exists(path):
            continue
        if kind == ".keras":
            model = keras.models.load_model(path)
            model(INPUTS[name])
        else:
            model.load_weights(path)
        for number, value in enumerate(model.get_weights()):
            assert value.tobytes() == values[str(number)].tobytes(), (path, names(model)[number])
        print("loaded", name + kind)
"""


def run(script, which, folder):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _MODELS + script, which, str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# What goes by a number: variables of layers that are the model's own, and what a normalization
# without all of its variables has, where no configuration says which.
UNNAMED = [
    "classes.keras: block/0",
    "classes.weights.h5: block/0",
    *(f"images.weights.h5: bn/{number}" for number in range(3)),
    *(f"words.weights.h5: inner/batch_normalization/{number}" for number in range(3)),
    "words.weights.h5: layer_normalization/0",
]


@pytest.mark.tensorflow
@pytest.mark.parametrize("which", ["keras", "tf_keras"])
def test_what_is_filled_here_is_what_keras_loads(tmp_path, which):
    pytest.importorskip(which)
    run(_SAVE, which, tmp_path)
    unnamed = []
    kinds = [path.name.removeprefix("fresh_") for path in sorted(tmp_path.glob("fresh_*"))]
    for kind in kinds:
        truth = np.load(tmp_path / f"{kind.partition('.')[0]}.npz")
        by_name = {str(name): truth[str(number)] for number, name in enumerate(truth["names"])}
        with open_checkpoint(tmp_path / f"full_{kind}") as reader:
            roles = reader.roles()
            values = {n: reader.read(n) for n, r in roles.items() if r.kind is RoleKind.VARIABLE}
            for name, value in values.items():
                others = (name, *reader.variables()[name].aliases)
                same = [by_name[other] for other in others if other in by_name]
                assert all(value.tobytes() == known.tobytes() for known in same)
                if not same:
                    unnamed.append(f"{kind}: {name}")
        filled(tmp_path / f"fresh_{kind}", tmp_path / f"filled_{kind}", values)
    loaded = run(_LOAD, which, tmp_path).splitlines()
    assert sorted(loaded) == [f"loaded {kind}" for kind in kinds]
    if which == "tf_keras":  # whose .weights.h5 tell no names, nor its classes' configurations
        unnamed = [n for n in unnamed if ".weights.h5" not in n and "classes.keras" not in n]
    assert unnamed == (UNNAMED if which == "keras" else [])


@pytest.mark.tensorflow
def test_keras_loads_bfloat16_that_was_filled_here(tmp_path):
    keras = pytest.importorskip("keras")
    import ml_dtypes

    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, name="fc", dtype="bfloat16")]
    )
    fresh = tmp_path / "fresh.weights.h5"
    model.save_weights(fresh)
    values = np.arange(12).reshape(4, 3).astype(ml_dtypes.bfloat16)
    path = filled(fresh, tmp_path / "out.weights.h5", {"fc/kernel": values})
    model.load_weights(path)
    assert np.asarray(model.layers[0].kernel, np.float32).tolist() == values.tolist()


def test_every_error_is_one_of_ours(tmp_path):
    path = tmp_path / "x.h5"
    for data in (b"", b"P", b"PK", b"PK\x05\x06" + bytes(18), b"\x89HDF\r\n\x1a\n", bytes(5000)):
        path.write_bytes(data)
        with pytest.raises(CompatRestoreError):
            KerasH5Reader(str(path))


@pytest.mark.parametrize("name", ["keras.keras", "tf_keras.keras"])
def test_no_value_of_a_damaged_archive_is_given_copied_or_blessed(files, tmp_path, name):
    path = tmp_path / name
    data = (files / name).read_bytes()
    with open_checkpoint(files / name) as reader:
        [stored] = reader.stored(max(reader.specs(), key=lambda key: reader.specs()[key].nbytes))
    path.write_bytes(
        data[: stored.offset] + bytes([data[stored.offset] ^ 1]) + data[stored.offset + 1 :]
    )
    with open_checkpoint(path) as reader:
        for key in reader.specs():
            with pytest.raises(DamagedCheckpointError, match="checksum"):
                reader.read(key)
    with pytest.raises(DamagedCheckpointError, match="checksum"):
        convert(path, tmp_path / "out" / "m")
    with pytest.raises(DamagedCheckpointError, match="checksum"):
        convert(files / name, tmp_path / "out" / "m.keras", into=path)
    assert not (tmp_path / "out").exists()

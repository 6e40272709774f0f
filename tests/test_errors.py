"""Errors: each is also the fitting builtin, and says its message plainly."""

from __future__ import annotations

import copy
import pickle
import time

import pytest

from compat_restore import errors
from compat_restore.errors import (
    CompatRestoreError,
    DamagedCheckpointError,
    DamagedTensorsError,
    FaultsError,
    PlanError,
    TensorNotFoundError,
    faults_of,
    nearest,
)
from compat_restore.rules import InvalidRulesError

BUILTINS = {
    "CheckpointNotFoundError": FileNotFoundError,
    "CheckpointFormatError": ValueError,
    "DamagedCheckpointError": ValueError,
    "DamagedTensorsError": DamagedCheckpointError,
    "TensorNotFoundError": KeyError,
    "RuleError": ValueError,
    "TargetError": ValueError,
    "InitializationError": RuntimeError,
    "PreservationError": RuntimeError,
    "InputError": OSError,
    "OutputError": OSError,
    "UsageError": ValueError,
    "MissingDependencyError": ImportError,
    "FaultsError": ValueError,
    "PlanError": ValueError,
}


def test_the_list_of_errors_is_complete():
    assert set(BUILTINS) == set(errors.__all__) - {"CompatRestoreError", "faults_of", "nearest"}


@pytest.mark.parametrize("name", BUILTINS)
def test_each_error_is_ours_and_also_its_builtin(name: str):
    kind = getattr(errors, name)
    assert issubclass(kind, CompatRestoreError)
    assert issubclass(kind, BUILTINS[name])


@pytest.mark.parametrize(
    "name", sorted(set(BUILTINS) - {"DamagedTensorsError", "FaultsError", "PlanError"})
)
def test_an_error_shows_its_message_and_nothing_else(name: str):
    assert str(getattr(errors, name)("no tensor 'a': it's \"gone\"")) == (
        "no tensor 'a': it's \"gone\""
    )


def test_a_missing_tensor_is_not_shown_in_quotes_as_key_errors_are():
    with pytest.raises(KeyError) as caught:
        raise TensorNotFoundError("no tensor 'w'\nin it")
    assert str(caught.value) == "no tensor 'w'\nin it"


def test_an_error_without_a_message_shows_its_name():
    assert str(CompatRestoreError()) == "CompatRestoreError"


def test_faults_are_listed_one_a_line():
    error = PlanError("two faults:", (fault for fault in ("a is b", "c is d")))
    assert error.summary == "two faults:"
    assert error.faults == ("a is b", "c is d")
    assert str(error) == "two faults:\n  - a is b\n  - c is d"


def test_one_damaged_tensor_is_a_message_and_several_are_a_list():
    assert str(DamagedTensorsError(["a is cut"])) == "a is cut"
    both = DamagedTensorsError(["a is cut", "b too"])
    assert str(both) == "2 tensors are damaged:\n  - a is cut\n  - b too"
    for error in (both, DamagedTensorsError(["a is cut"])):
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.faults) == (str(error), error.faults)
    assert faults_of(both) == ("a is cut", "b too")
    assert faults_of(TensorNotFoundError("gone")) == ("gone",)


@pytest.mark.parametrize("kind", [FaultsError, PlanError, InvalidRulesError])
def test_faults_survive_the_way_to_another_process(kind: type[FaultsError]):
    error = kind("two:", ["a", "b"])
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is kind
        assert str(other) == str(error)
        assert other.faults == ("a", "b")
        assert other.summary == "two:"


# Nearest names


def test_the_nearest_name_comes_first():
    names = ["encoder/layer_0/kernel", "encoder/layer_0/bias", "decoder/emb"]
    assert nearest("encoder/layer_0/kernal", names)[0] == "encoder/layer_0/kernel"
    assert nearest("encodr/layer_0/bias", names)[0] == "encoder/layer_0/bias"


def test_nothing_is_near_to_something_else():
    assert nearest("zzz", ["encoder", "decoder"]) == ()
    assert nearest("zzz", []) == ()


def test_no_more_names_are_given_than_asked_for():
    assert len(nearest("w_0", [f"w_{n}" for n in range(50)])) == 3
    assert len(nearest("w_0", [f"w_{n}" for n in range(50)], 1)) == 1


def many_names(count: int) -> list[str]:
    return [f"model/decoder/block_{n}/attention/query_projection/kernel" for n in range(count)]


@pytest.mark.parametrize(
    "name",
    [
        "model/decodr/block_19999/attention/query_projection/kernel",
        "model/decoder/block_19999/attention/query_projection/kernal",
    ],
)
def test_the_nearest_of_20000_names_is_found_quickly(name: str):
    names = many_names(20_000)
    started = time.process_time()
    near = nearest(name, names)
    assert time.process_time() - started < 1
    assert near[0] == "model/decoder/block_19999/attention/query_projection/kernel"


def test_names_without_anything_in_common_are_put_aside_quickly():
    started = time.process_time()
    assert nearest("0123456789" * 10, many_names(20_000)) == ()
    assert time.process_time() - started < 1


def test_a_message_of_thousands_of_faults_shows_the_first_and_counts_the_rest() -> None:
    error = FaultsError("they are", [f"fault {number}" for number in range(20_000)])
    assert len(error.faults) == 20_000
    assert "fault 49" in str(error)
    assert "fault 50" not in str(error)
    assert str(error).endswith("... and 19950 more")

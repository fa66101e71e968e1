import pytest

from tests.faults.runs import run


@pytest.fixture(scope="session")
def quiet(tmp_path_factory):
    """The folder of the run that nothing happens to, on two ranks."""
    folder = tmp_path_factory.mktemp("quiet") / "run"
    result = run(folder)
    assert result.returncode == 0, result.stderr
    return folder

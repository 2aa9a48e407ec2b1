import importlib
import sys

import pytest

import tdlrt


@pytest.mark.parametrize(("module", "extra"), [("lightning", "lightning"), ("transformers", "hf")])
def test_a_missing_stack_names_the_extra(monkeypatch, module, extra):
    monkeypatch.delitem(sys.modules, f"tdlrt.integrations.{module}", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(tdlrt.MissingExtraError, match=rf"{module}, which.*'tdlrt\[{extra}\]'"):
        importlib.import_module(f"tdlrt.integrations.{module}")

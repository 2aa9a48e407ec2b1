"""The one module replacement."""

from torch import nn

from tdlrt.surgery import replace_modules


def test_a_module_is_replaced_wherever_it_stands():
    shared, inner, other = nn.Linear(3, 3), nn.ReLU(), nn.Tanh()
    model = nn.ModuleDict({"a": nn.Sequential(shared, inner), "b": shared, "c": other})
    model.register_module("nothing", None)
    new, identity = nn.Linear(3, 3), nn.Identity()
    replace_modules(model, {shared: new, inner: identity})
    assert model["a"][0] is new is model["b"]
    assert model["a"][1] is identity
    assert model["c"] is other


def test_a_new_module_may_hold_the_old_one():
    old = nn.Linear(3, 3)
    model, wrapped = nn.Sequential(old), nn.Sequential(old, nn.ReLU())
    replace_modules(model, {old: wrapped})
    assert model[0] is wrapped
    assert wrapped[0] is old

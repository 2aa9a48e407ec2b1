"""No file of either package imports itself by way of others; import-linter checks the floors."""

from graphlib import TopologicalSorter

import grimp


def test_no_circle_between_files():
    graph = grimp.build_graph("tdlrt", "tdlrt_lab", exclude_type_checking_imports=False)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert len(imports) > 100
    TopologicalSorter(imports).prepare()  # raises a CycleError that names the files

"""Reports: run directories read, tables, pictures and one page made from them."""

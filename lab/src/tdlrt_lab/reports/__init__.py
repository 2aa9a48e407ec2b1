"""Reports: tables, figures and an HTML page made from run directories."""

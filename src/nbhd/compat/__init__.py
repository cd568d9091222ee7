"""Other libraries' names over nbhd's operator: :mod:`nbhd.compat.natten`."""

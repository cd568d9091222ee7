"""What the eras of NATTEN share: each era's files only arrange these under its own names and argument orders."""

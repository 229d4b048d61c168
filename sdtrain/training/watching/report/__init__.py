"""`report.html`: a run on one page that opens without a server and without a network."""

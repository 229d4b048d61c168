"""What helps before and beside a run: the settings explained, the machine looked at, answers for programs; no torch."""

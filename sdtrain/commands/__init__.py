"""What each command of sdtrain does, a file a command."""

"""What every room stands on: arguments, errors, files, secrets, tensors. Imported file by file."""

"""What every package uses: arguments, errors, files, Markdown, secrets, tensors. Imported file by file."""

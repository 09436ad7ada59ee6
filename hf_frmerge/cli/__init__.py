"""The `frmerge` command: thin click commands that parse, call and print. Heavy imports happen inside a command."""

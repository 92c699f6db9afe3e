"""The commands of `wadi`, a file each: parse, call a room, print.

The table of commands is `wadi.cli.COMMANDS`. A command that does not need torch to know its options imports
the rooms in its function, so that its help is quick.
"""

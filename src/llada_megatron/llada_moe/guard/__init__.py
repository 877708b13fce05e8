"""Code that is not ours and comes with a file (tokenizers, chat templates) runs in a process with limits.

`process.call` runs a function there and gives back its result, or raises one clear error; `limits` sets the limits of a
process, and `answering` is the program that runs in it. Only JSON values travel between the two processes.
"""

"""Chat: conversations become prompts by the checkpoint's template, and texts become messages.

`environment` (the sandbox of templates) and `parsing` are pure. `render_process` renders templates in a
process with limits, and `renderer` runs such processes.
"""

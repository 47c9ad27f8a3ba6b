"""Runs a program for WASI in wasmtime: wasi.py PROGRAM ARGUMENT…

It sees this machine's files and its environment.
"""

import sys

import wasmtime

config = wasmtime.Config()
config.cache = True
engine = wasmtime.Engine(config)
linker = wasmtime.Linker(engine)
linker.define_wasi()
wasi = wasmtime.WasiConfig()
wasi.argv = sys.argv[1:]
wasi.inherit_env()
wasi.preopen_dir(".", ".")
wasi.preopen_dir("/", "/")
wasi.inherit_stdout()
wasi.inherit_stderr()
store = wasmtime.Store(engine)
store.set_wasi(wasi)
instance = linker.instantiate(store, wasmtime.Module.from_file(engine, sys.argv[1]))
try:
    instance.exports(store)["_start"](store)
except wasmtime.ExitTrap as ended:
    sys.exit(ended.code)

"""Programs, installed as package emu3_tools with console scripts emu3-..."""

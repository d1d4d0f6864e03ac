"""The commands: `lipjax train`, `certify`, `check`, `report`, `plan`, `data`, `export`,
`models`."""

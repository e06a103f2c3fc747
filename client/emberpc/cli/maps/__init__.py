"""Maps of collections: sample the records, lay them out in a plane, group and colour them, render an HTML page."""

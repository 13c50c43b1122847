require('fimserver.entry').define()

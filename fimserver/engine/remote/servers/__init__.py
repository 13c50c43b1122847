"""Know the requests and answers of each kind of server."""

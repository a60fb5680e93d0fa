"""The API's routes, a file a resource: each reads its arguments, asks one object, and answers."""

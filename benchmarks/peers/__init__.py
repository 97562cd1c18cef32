"""One module a contestant: ``train(matrix, run) -> apply`` through the library's own public interface."""

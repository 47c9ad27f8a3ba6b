#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| flowtape_tests::fuzz::run("parquet", bytes));

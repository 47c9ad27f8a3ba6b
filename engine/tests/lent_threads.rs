//! A pool of threads that a host starts, as a page starts workers. A file of its own: a process has one such pool.
#![allow(clippy::unwrap_used)] // a test

use std::collections::HashSet;

use flowtape_engine::cpu::{alone, awake};
use flowtape_engine::platform::{lend_thread, share_lent_threads};
use flowtape_engine::{Device, Tensor};

#[test]
fn lent_threads_share_operations_and_change_no_bit() {
    let lent: HashSet<_> = (0..2).map(|_| std::thread::spawn(lend_thread).thread().id()).collect();
    share_lent_threads(2).unwrap();
    let here = std::thread::current().id();
    let pool: HashSet<_> = HashSet::from_iter(rayon::broadcast(|_| std::thread::current().id()));
    assert_eq!(pool, lent.into_iter().chain([here]).collect());
    let cpu = Device::cpu();
    let values = |n: usize| (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 64.0).collect::<Vec<_>>();
    let a = Tensor::from_vec(values(96 * 300), &[96, 300], &cpu).unwrap();
    let b = Tensor::from_vec(values(300 * 200), &[300, 200], &cpu).unwrap();
    let product = || a.matmul(&b).unwrap().to_vec::<f32>().unwrap();
    assert!(awake(&cpu, product) == alone(product));
    // There is one such pool.
    assert!(share_lent_threads(1).is_err());
}

//! What every engine of collectives must do, as seen by one rank: values that can be written down.

use flowtape_engine::comm::{Collective, Comm};
use flowtape_engine::{DType, Result, Tensor};

/// Element `i` of what rank `rank` brings; rounding makes sums in f32 depend on their order.
fn brought(rank: usize, i: usize) -> f32 {
    let sign = if (rank + i).is_multiple_of(2) { 1.0 } else { -1.0 };
    sign * (1.0 + i as f32 * 0.37 + rank as f32 * 1e3) * 10f32.powi((rank % 5) as i32 - 2)
}

/// In the order of the ranks, in f32.
fn sum(world: usize, i: usize) -> f32 {
    (1..world).fold(brought(0, i), |sum, rank| sum + brought(rank, i))
}

/// Runs all collectives on this rank and compares them with their definitions: bit for bit, but for sums of an engine that has an
/// order of its own. All ranks of `comm` call it together.
///
/// # Errors
/// When a call fails.
///
/// # Panics
/// When a result is another.
pub fn check(comm: &dyn Comm) -> Result<()> {
    let (rank, world, device) = (comm.rank(), comm.world_size(), comm.device());
    assert!(rank < world);
    let mine = |of: usize, n: usize| (0..n).map(|i| brought(of, i)).collect::<Vec<f32>>();
    let tensor = |values: &[f32]| Tensor::from_slice(values, &[values.len()], &device);
    let same = |got: &[f32], expected: &[f32], what: &str| {
        let near =
            |(a, b): (&f32, &f32)| if comm.is_ordered() { a == b } else { (a - b).abs() <= 1e-5 * (b.abs() + 1e3) };
        assert!(
            got.len() == expected.len() && got.iter().zip(expected).all(near),
            "{what} on rank {rank}: {got:?} {expected:?}"
        );
    };
    // One element, fewer than ranks, odd numbers, and more than a block of the CPU's programs.
    for n in [1, 3, 1031] {
        let values = mine(rank, n);
        for root in 0..world {
            let x = tensor(&values)?;
            comm.broadcast(&x, root)?;
            assert_eq!(x.to_vec::<f32>()?, mine(root, n));
        }
        let x = tensor(&values)?;
        comm.all_reduce(&x)?;
        let sums: Vec<f32> = (0..n).map(|i| sum(world, i)).collect();
        same(&x.to_vec()?, &sums, "all-reduce");
        for root in [0, world - 1] {
            let x = tensor(&values)?;
            comm.reduce(&x, root)?;
            same(&x.to_vec()?, if rank == root { &sums } else { &values }, "reduce");
        }
        // Two at once, which end in either order.
        let (a, b) = (tensor(&values)?, tensor(&values)?);
        let first = comm.start(Collective::all_reduce(comm, &a)?)?;
        let second = comm.start(Collective::all_reduce(comm, &b)?)?;
        second.wait()?;
        first.wait()?;
        same(&a.to_vec()?, &sums, "the first of two");
        same(&b.to_vec()?, &sums, "the second of two");
        // Halves: summed in f32 and rounded once.
        let halves = tensor(&values)?.to_dtype(DType::BF16)?;
        comm.all_reduce(&halves)?;
        let round = |x: f32| half::bf16::from_f32(x).to_f32();
        let sums: Vec<f32> =
            (0..n).map(|i| round((1..world).fold(round(brought(0, i)), |s, r| s + round(brought(r, i))))).collect();
        if comm.is_ordered() {
            assert_eq!(halves.to_vec::<f32>()?, sums, "bf16 on rank {rank}");
        }
        let all = mine(rank, n * world);
        let sums: Vec<f32> = (rank * n..(rank + 1) * n).map(|i| sum(world, i)).collect();
        let (source, target) = (tensor(&all)?, Tensor::zeros(&[n], DType::F32, &device)?);
        comm.reduce_scatter(&source, &target)?;
        same(&target.to_vec()?, &sums, "reduce-scatter");
        assert_eq!(source.to_vec::<f32>()?, all);
        comm.reduce_scatter(&source, &source.narrow(0, rank * n, n)?)?;
        same(&source.narrow(0, rank * n, n)?.to_vec()?, &sums, "reduce-scatter in place");
        let gathered: Vec<f32> = (0..world).flat_map(|r| mine(r, n)).collect();
        let (source, target) = (tensor(&values)?, Tensor::zeros(&[world, n], DType::F32, &device)?);
        comm.all_gather(&source, &target)?;
        assert_eq!(target.to_vec::<f32>()?, gathered);
        let target = Tensor::zeros(&[world * n], DType::F32, &device)?;
        let own = target.narrow(0, rank * n, n)?;
        own.copy_from(&tensor(&values)?)?;
        comm.all_gather(&own, &target)?;
        assert_eq!(target.to_vec::<f32>()?, gathered);
        let exchanged: Vec<f32> =
            (0..world).flat_map(|r| (rank * n..(rank + 1) * n).map(move |i| brought(r, i))).collect();
        let target = Tensor::zeros(&[n * world], DType::F32, &device)?;
        comm.all_to_all(&tensor(&all)?, &target)?;
        assert_eq!(target.to_vec::<f32>()?, exchanged);
    }
    for root in [0, world - 1] {
        for len in [0, 1, 6, 4096] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + root) as u8).collect();
            assert_eq!(comm.share(if rank == root { &bytes } else { &[9] }, root)?, bytes);
        }
        assert!(comm.any(rank == root)?);
    }
    assert!(!comm.any(false)?);
    // Neighbours, and every other one.
    for color_of in [|rank: usize| rank / 2, |rank: usize| rank % 2] {
        let group = comm.split(&color_of)?;
        let ranks: Vec<usize> = (0..world).filter(|r| color_of(*r) == color_of(rank)).collect();
        assert_eq!((group.world_size(), ranks[group.rank()]), (ranks.len(), rank));
        let target = Tensor::zeros(&[ranks.len()], DType::F32, &group.device())?;
        group.all_gather(&Tensor::full(&[1], rank as f64, DType::F32, &group.device())?, &target)?;
        assert_eq!(target.to_vec::<f64>()?, ranks.iter().map(|r| *r as f64).collect::<Vec<_>>());
    }
    comm.barrier()?;
    comm.check()
}

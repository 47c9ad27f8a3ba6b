//! Collectives between ranks: what each comes to, what is refused, and that no rank waits for one that failed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // the helpers of tests may panic

use std::sync::Arc;

use flowtape_engine::comm::{Collective, Comm, Planned, Solo, Threads};
use flowtape_engine::meta::Meta;
use flowtape_engine::{DType, Device, Error, Result, Tensor};

fn as_ranks<T: Send>(world: usize, work: impl Fn(&dyn Comm) -> Result<T> + Sync) -> Vec<Result<T>> {
    Threads::run(world, &Device::cpu(), |comm: Arc<dyn Comm>| work(&*comm))
}

#[test]
fn every_collective_is_its_definition() {
    flowtape_tests::comm::check(&Solo).unwrap();
    for world in [1, 2, 3, 4, 8] {
        as_ranks(world, flowtape_tests::comm::check).into_iter().for_each(|done| done.unwrap());
    }
}

#[test]
fn operands_that_do_not_fit_are_refused_before_anyone_waits() {
    let done = as_ranks(2, |comm| {
        let cpu = Device::cpu();
        let zeros = |n: usize, dtype| Tensor::zeros(&[n], dtype, &cpu);
        let (a, b) = (zeros(4, DType::F32)?, zeros(3, DType::F32)?);
        let refused = [
            Collective::broadcast(comm, &a, 2).err(),
            Collective::reduce(comm, &a, 2).err(),
            Collective::reduce(comm, &zeros(4, DType::U32)?, 0).err(),
            Collective::all_reduce(comm, &zeros(4, DType::U32)?).err(),
            Collective::all_reduce(comm, &Tensor::zeros(&[2, 2], DType::F32, &cpu)?.t()?).err(),
            Collective::reduce_scatter(comm, &a, &b).err(),
            Collective::reduce_scatter(comm, &a, &a.narrow(0, 1, 2)?).err(),
            Collective::all_gather(comm, &b, &a).err(),
            Collective::all_gather(comm, &zeros(2, DType::F64)?, &a).err(),
            Collective::all_gather(comm, &a.narrow(0, 2 - 2 * comm.rank(), 2)?, &a).err(),
            Collective::all_to_all(comm, &b, &zeros(3, DType::F32)?).err(),
            Collective::all_to_all(comm, &a, &a).err(),
            Collective::all_gather(comm, &Tensor::zeros(&[2], DType::F32, &Meta::default().device())?, &a).err(),
        ];
        assert!(refused.iter().all(Option::is_some), "{refused:?}");
        comm.all_reduce(&a)
    });
    done.into_iter().for_each(|done| done.unwrap());
}

#[test]
fn a_rank_that_gives_up_or_goes_wakes_all_who_wait_and_is_named() {
    let told = |done: Vec<Result<()>>| done.into_iter().map(|d| d.unwrap_err().to_string()).collect::<Vec<_>>();
    let tensor = || Tensor::ones(&[2], DType::F32, &Device::cpu());
    // An error of its own.
    let all = told(as_ranks(4, |comm| match comm.rank() {
        2 => Err(Error::argument("step", "a good disk", "a bad one")),
        _ => comm.all_reduce(&tensor()?),
    }));
    let others = all.iter().enumerate().filter(|(rank, _)| *rank != 2);
    assert!(others.into_iter().all(|(_, text)| text.contains("rank 2: step") && text.contains("a bad one")), "{all:?}");
    // It ends too early.
    let all = as_ranks(3, |comm| if comm.rank() == 1 { Ok(()) } else { comm.barrier() });
    let all: Vec<_> = all.into_iter().map(|done| done.map_err(|error| error.to_string())).collect();
    assert!(
        all[1].is_ok() && [0, 2].iter().all(|i| all[*i].as_ref().unwrap_err().contains("rank 1: ended")),
        "{all:?}"
    );
    // It does something else, of another size.
    let other = |comm: &dyn Comm| match comm.rank() {
        1 => comm.all_reduce(&Tensor::ones(&[3], DType::F32, &Device::cpu())?),
        _ => comm.all_reduce(&tensor()?),
    };
    let all = told(as_ranks(2, other));
    let expected = "rank 1: does all-reduce of 3 x f32 where rank 0 does all-reduce of 2 x f32";
    assert!(all.iter().all(|text| text.contains(expected)), "{all:?}");
    // In a group of its own, and whoever looks later.
    let all = told(as_ranks(4, |comm| {
        let group = comm.split(&|rank| rank / 2)?;
        if comm.rank() == 3 {
            return Err(Error::argument("step", "luck", "none"));
        }
        group.barrier()?;
        while comm.check().is_ok() {
            std::thread::yield_now();
        }
        comm.check()
    }));
    assert!(all[..3].iter().all(|text| text.contains("rank 3: step")), "{all:?}");
}

#[test]
fn ranks_without_data_are_counted_and_need_no_others() {
    let device = Meta::default().device();
    assert!(Planned::new(0, 2, &Device::cpu()).is_err() && Planned::new(2, 2, &device).is_err());
    let comm: Arc<dyn Comm> = Arc::new(Planned::new(3, 8, &device).unwrap());
    let (source, target) = (1 << 20, 8 << 20);
    let zeros = |n: usize| Tensor::zeros(&[n], DType::F32, &device).unwrap();
    comm.all_gather(&zeros(source), &zeros(target)).unwrap();
    assert!(comm.all_gather(&zeros(source), &zeros(source)).is_err());
    let group = comm.split(&|rank| rank % 2).unwrap();
    assert_eq!((group.rank(), group.world_size()), (1, 4));
    let devices: Vec<Device> = (0..2).map(|_| Meta::default().device()).collect();
    std::thread::scope(|scope| {
        for comm in Threads::on(&devices) {
            scope.spawn(move || comm.all_reduce(&Tensor::zeros(&[5], DType::F32, &comm.device()).unwrap()).unwrap());
        }
    });
}

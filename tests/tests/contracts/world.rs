//! Memories with windows on them, and what a call may do to them.

use flowtape_engine::backend::Ran;
use flowtape_engine::cpu::Cpu;
use flowtape_engine::gradcheck::Draw;
use flowtape_engine::{DType, Device, Error, Tensor};
use half::{bf16, f16};

/// Elements of a memory: a few views of small sizes, which often meet.
pub const LEN: usize = 2048;

/// Numbers in one allocation, and a twin that says where each of them lies.
pub struct Memory {
    pub flat: Tensor,
    pub places: Tensor,
}

impl Memory {
    pub fn new(draw: &mut Draw, dtype: DType, device: &Device, values: impl Fn(&mut Draw) -> f64) -> Self {
        let values: Vec<f64> = (0..LEN).map(|_| values(draw)).collect();
        let flat = Tensor::from_slice(&values, &[LEN], &Device::cpu()).unwrap().to_dtype(dtype).unwrap();
        let places: Vec<u32> = (0..LEN as u32).collect();
        let places = Tensor::from_slice(&places, &[LEN], &Device::cpu()).unwrap();
        Self { flat: flat.to_device(device).unwrap(), places }
    }
}

/// Whole numbers that every dtype holds, as their sums and products of two.
pub fn small(draw: &mut Draw) -> f64 {
    draw.size(0, 8) as f64
}

/// A window on one of the memories, and where its elements lie, row-major.
pub struct View {
    pub tensor: Tensor,
    pub memory: usize,
    pub places: Vec<usize>,
}

impl View {
    pub fn repeats(&self) -> bool {
        let mut sorted = self.places.clone();
        sorted.sort_unstable();
        sorted.windows(2).any(|w| w[0] == w[1])
    }

    pub fn meets(&self, other: &Self) -> bool {
        self.memory == other.memory && self.places.iter().any(|place| other.places.contains(place))
    }

    pub fn is(&self, other: &Self) -> bool {
        self.memory == other.memory && self.places == other.places
    }

    pub fn is_dense(&self) -> bool {
        self.places.windows(2).all(|w| w[1] == w[0] + 1)
    }
}

/// How likely a view is something other than a plain tensor, in percent.
#[derive(Clone, Copy)]
pub struct Odds {
    pub expanded: usize,
    pub padded: usize,
    pub turned: usize,
}

pub const ANY: Odds = Odds { expanded: 10, padded: 30, turned: 40 };
pub const OUTPUT: Odds = Odds { expanded: 2, ..ANY };
pub const PLAIN: Odds = Odds { expanded: 1, padded: 3, turned: 5 };

pub struct World<'a> {
    pub draw: Draw,
    pub device: &'a Device,
    pub memories: Vec<Memory>,
}

impl<'a> World<'a> {
    pub fn new(seed: u64, device: &'a Device) -> Self {
        Self { draw: Draw::new(seed), device, memories: Vec::new() }
    }

    pub fn percent(&mut self, odds: usize) -> bool {
        self.draw.size(0, 99) < odds
    }

    pub fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.draw.size(0, all.len() - 1)]
    }

    /// Another memory: mostly on the device, sometimes on another.
    pub fn memory(&mut self, dtype: DType) -> usize {
        self.memory_of(dtype, small)
    }

    pub fn memory_of(&mut self, dtype: DType, values: impl Fn(&mut Draw) -> f64) -> usize {
        let other = self.percent(1).then(|| Device::new(Cpu::default()));
        let device = other.as_ref().unwrap_or(self.device);
        let memory = Memory::new(&mut self.draw, dtype, device, values);
        self.memories.push(memory);
        self.memories.len() - 1
    }

    /// A float dtype that the device computes in.
    pub fn float(&mut self) -> DType {
        let all = [DType::F32, DType::BF16, DType::F16, DType::F64];
        let count = if self.device.backend().has_f64() { 4 } else { 3 };
        self.pick(&all[..count])
    }

    pub fn dims(&mut self, rank: usize) -> Vec<usize> {
        (0..rank).map(|_| if self.percent(2) { 0 } else { self.draw.size(1, 4) }).collect()
    }

    /// The dims, mostly; sometimes others.
    pub fn perturbed(&mut self, dims: &[usize]) -> Vec<usize> {
        let mut dims = dims.to_vec();
        if self.percent(3) {
            match self.draw.size(0, 2) {
                0 => dims.push(1),
                1 => drop(dims.pop()),
                _ => dims.iter_mut().for_each(|d| *d += 1),
            }
        }
        dims
    }

    /// A window of these dims on a memory.
    pub fn view(&mut self, memory: usize, dims: &[usize], odds: Odds) -> View {
        let rank = dims.len();
        let mut order: Vec<usize> = (0..rank).collect();
        if self.percent(odds.turned) && rank > 1 {
            let (a, b) = (self.draw.size(0, rank - 1), self.draw.size(0, rank - 1));
            order.swap(a, b);
        }
        let mut inverse = vec![0; rank];
        order.iter().enumerate().for_each(|(i, &axis)| inverse[axis] = i);
        let (mut before, mut stored) = (vec![0; rank], dims.to_vec());
        for axis in 0..rank {
            if self.percent(odds.expanded) && dims[axis] > 0 {
                stored[axis] = 1;
            } else if self.percent(odds.padded) {
                before[axis] = self.draw.size(0, 1);
                stored[axis] = dims[axis] + before[axis] + self.draw.size(0, 1);
            }
        }
        if stored.iter().product::<usize>() > LEN {
            (before, stored) = (vec![0; rank], dims.to_vec());
        }
        let total: usize = stored.iter().product();
        let offset = self.draw.size(0, LEN - total);
        let cut = |flat: &Tensor| {
            let lying: Vec<usize> = order.iter().map(|&axis| stored[axis]).collect();
            let mut view = flat.narrow(0, offset, total)?.reshape(&lying)?.permute(&inverse)?;
            for axis in 0..rank {
                if stored[axis] != 1 || dims[axis] == 1 {
                    view = view.narrow(axis, before[axis], dims[axis])?;
                }
            }
            view.expand(dims)
        };
        let Memory { flat, places } = &self.memories[memory];
        let (tensor, places) = (cut(flat).unwrap(), cut(places).unwrap().to_vec::<u32>().unwrap());
        View { tensor, memory, places: places.into_iter().map(|place| place as usize).collect() }
    }

    /// What all memories hold.
    pub fn values(&self) -> Vec<Vec<f64>> {
        self.memories.iter().map(|m| m.flat.to_vec::<f64>().unwrap()).collect()
    }

    pub fn read(&self, all: &[Vec<f64>], view: &View) -> Vec<f64> {
        view.places.iter().map(|&place| all[view.memory][place]).collect()
    }

    /// Writes numbers as the memory's dtype rounds them.
    pub fn write(&self, all: &mut [Vec<f64>], view: &View, values: impl IntoIterator<Item = f64>) {
        let dtype = self.memories[view.memory].flat.dtype();
        for (&place, value) in view.places.iter().zip(values) {
            all[view.memory][place] = rounded(dtype, value);
        }
    }

    pub fn on_one_device<'v>(&self, views: impl IntoIterator<Item = &'v View>) -> bool {
        let mut devices = views.into_iter().map(|v| v.tensor.device());
        let first = devices.next();
        devices.all(|d| first.is_some_and(|first| first.same(d)))
    }
}

pub fn rounded(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::F64 => value,
        DType::F32 => f64::from(value as f32),
        DType::BF16 => bf16::from_f64(value).to_f64(),
        DType::F16 => f16::from_f64(value).to_f64(),
        DType::U32 => f64::from(value as u32),
    }
}

/// What is written meets nothing else that is written, and of what is read at most itself, where that is allowed.
pub fn apart(reads: &[&View], writes: &[&View], in_place: bool) -> bool {
    writes.iter().enumerate().all(|(i, w)| {
        !w.repeats()
            && writes[i + 1..].iter().all(|other| !w.meets(other))
            && reads.iter().all(|r| !w.meets(r) || (in_place && w.is(r)))
    })
}

pub fn refs(views: &[View]) -> Vec<&View> {
    views.iter().collect()
}

pub fn tensors(views: &[View]) -> Vec<&Tensor> {
    views.iter().map(|v| &v.tensor).collect()
}

/// Compares a call's answer with what is right: an error that changes nothing, or `after`.
pub fn check(
    world: &World<'_>,
    what: &str,
    answer: Result<(), Error>,
    legal: bool,
    before: Vec<Vec<f64>>,
    after: impl FnOnce(&mut Vec<Vec<f64>>),
) -> bool {
    let mut expected = before;
    match (answer, legal) {
        (Ok(()), true) => after(&mut expected),
        (Err(error), false) => assert!(!matches!(error, Error::DeviceFailed { .. }), "{what}: {error}"),
        (Ok(()), false) => panic!("{what}: what breaks the contract was done"),
        (Err(error), true) => panic!("{what}: {error}"),
    }
    for (memory, (got, expected)) in world.values().iter().zip(&expected).enumerate() {
        if let Some(place) = (0..LEN).find(|&i| got[i].to_bits() != expected[i].to_bits() && got[i] != expected[i]) {
            let dtype = world.memories[memory].flat.dtype();
            panic!("{what}: memory {memory} ({dtype}) at {place}: {} instead of {}", got[place], expected[place]);
        }
    }
    legal
}

pub fn number(draw: &mut Draw) -> f64 {
    draw.number(-2.0, 2.0)
}

/// A fused call writes its outputs and nothing else; what it writes is near the reference.
pub fn near(
    world: &World<'_>,
    what: &str,
    answer: Result<Ran, Error>,
    legal: bool,
    before: &[Vec<f64>],
    outputs: &[(&View, Vec<f64>)],
) -> bool {
    let after = world.values();
    let written = |memory: usize, place: usize| {
        outputs.iter().find_map(|(v, values)| {
            let at = v.places.iter().position(|&p| p == place).filter(|_| v.memory == memory)?;
            Some((values.get(at).copied().unwrap_or(f64::NAN), v.tensor.dtype()))
        })
    };
    let ran = match (answer, legal) {
        (Ok(ran), true) => ran == Ran::Done,
        (Err(_), false) => false,
        (Ok(_), false) => panic!("{what}: what breaks the contract was done"),
        (Err(error), true) => panic!("{what}: {error}"),
    };
    for (memory, (got, before)) in after.iter().zip(before).enumerate() {
        for place in 0..LEN {
            match written(memory, place).filter(|_| legal) {
                None => assert_eq!(got[place].to_bits(), before[place].to_bits(), "{what}: beside its outputs"),
                Some((expected, dtype)) if ran => {
                    let unit = if dtype == DType::F32 { 1e-5 } else { 2f64.powi(-6) };
                    let off = (got[place] - expected).abs();
                    assert!(off <= unit * (1.0 + expected.abs()), "{what}: {} instead of {expected}", got[place]);
                }
                Some(_) => {}
            }
        }
    }
    legal
}

/// A call that has the right shapes or not: it is done or declined, or an error, and writes its outputs at most.
pub fn kept_to_itself(
    world: &World<'_>,
    what: &str,
    call: impl FnOnce() -> Result<Ran, Error>,
    fits: bool,
    reads: &[&View],
    writes: &[&View],
) -> bool {
    let legal = fits && apart(reads, writes, false) && world.on_one_device(reads.iter().chain(writes).copied());
    let before = world.values();
    let answer = call();
    assert_eq!(answer.is_ok(), legal, "{what}: {answer:?}");
    for (memory, (after, before)) in world.values().iter().zip(&before).enumerate() {
        for place in 0..LEN {
            let own = legal && writes.iter().any(|v| v.memory == memory && v.places.contains(&place));
            assert!(own || after[place].to_bits() == before[place].to_bits(), "{what}: beside its outputs");
            // Large probabilities may exceed f16.
            let finite = after[place].is_finite() || world.memories[memory].flat.dtype() == DType::F16;
            assert!(!own || !matches!(answer, Ok(Ran::Done)) || finite, "{what}: {}", after[place]);
        }
    }
    legal
}

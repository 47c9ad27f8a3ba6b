//! The ranks of a run by the environment that a launcher sets.

use std::fmt::{Display, Formatter, Result as FmtResult};

use crate::platform::parent;
use crate::{Error, Result};

/// Who started the processes of a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Launcher {
    /// `torchrun --no-python flowtape train ...`, `flowtape train --nproc`, or whoever sets `RANK`, `WORLD_SIZE` and so on.
    Torchrun,
    /// `srun flowtape train ...`.
    Slurm,
    /// `mpirun flowtape train ...` of Open MPI.
    OpenMpi,
    /// `mpiexec` of MPICH and its kin.
    Mpich,
}

/// Where rank 0 is found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Address {
    /// A name or an address.
    pub host: String,
    /// Its port.
    pub port: u16,
}

impl Display for Address {
    fn fmt(&self, f: &mut Formatter<'_>) -> FmtResult {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// Which of the processes of a run this one is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct World {
    /// Who said so.
    pub launcher: Launcher,
    /// This process, from 0.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
    /// This process among those of its machine.
    pub local_rank: usize,
    /// How many are on its machine.
    pub local_size: usize,
    /// Where rank 0 is found, where that was said or follows from the launcher's numbers.
    pub master: Option<Address>,
}

/// What a launcher calls the numbers.
struct Names {
    launcher: Launcher,
    rank: &'static str,
    size: &'static str,
    local_rank: &'static str,
    local_size: &'static str,
}

const TORCHRUN: Names = Names {
    launcher: Launcher::Torchrun,
    rank: "RANK",
    size: "WORLD_SIZE",
    local_rank: "LOCAL_RANK",
    local_size: "LOCAL_WORLD_SIZE",
};

/// The others, in the order in which they are asked: a step of Slurm may run MPI's processes, and sets both.
const OTHERS: [Names; 3] = [
    Names {
        launcher: Launcher::OpenMpi,
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_size: "OMPI_COMM_WORLD_LOCAL_SIZE",
    },
    // A script of sbatch is SLURM_PROCID 0 of SLURM_NTASKS, too, without being one of them: only srun sets this size.
    Names {
        launcher: Launcher::Slurm,
        rank: "SLURM_PROCID",
        size: "SLURM_STEP_NUM_TASKS",
        local_rank: "SLURM_LOCALID",
        local_size: "SLURM_STEP_TASKS_PER_NODE",
    },
    Names {
        launcher: Launcher::Mpich,
        rank: "PMI_RANK",
        size: "PMI_SIZE",
        local_rank: "MPI_LOCALRANKID",
        local_size: "MPI_LOCALNRANKS",
    },
];

const MASTER_ADDR: &str = "MASTER_ADDR";
const MASTER_PORT: &str = "MASTER_PORT";
/// Set where torchrun itself listens at `MASTER_PORT`.
const AGENT_LISTENS: &str = "TORCHELASTIC_USE_AGENT_STORE";

impl World {
    /// The one that this process's environment describes; none where it was started alone.
    ///
    /// # Errors
    /// When a launcher's names are set in part, or do not fit each other: they are named, with what is missing.
    pub fn of_environment() -> Result<Option<Self>> {
        let parent = parent();
        Self::of(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()), parent)
    }

    /// The same of variables by name; `parent` is the process that started this one.
    fn of(get: &dyn Fn(&str) -> Option<String>, parent: u32) -> Result<Option<Self>> {
        let started = |names: &&Names| get(names.rank).is_some() && get(names.size).is_some();
        let other = OTHERS.iter().find(started);
        // Scripts export WORLD_SIZE and MASTER_ADDR for processes that Slurm or MPI counts.
        let torchrun = get(TORCHRUN.rank).is_some() || get(TORCHRUN.local_rank).is_some();
        match other {
            _ if torchrun => Self::by(&TORCHRUN, get, parent).map(Some),
            Some(names) => {
                let world = Self::by(names, get, parent)?;
                match number(get, TORCHRUN.size)? {
                    Some(size) if size != world.size => Err(wrong(format!(
                        "WORLD_SIZE is {size}, but {} is {}: leave WORLD_SIZE out, or start as many",
                        names.size, world.size
                    ))),
                    _ => Ok(Some(world)),
                }
            }
            None if number(get, TORCHRUN.size)?.is_some_and(|size| size > 1) => {
                Self::by(&TORCHRUN, get, parent).map(Some)
            }
            None => Ok(None),
        }
    }

    fn by(names: &Names, get: &dyn Fn(&str) -> Option<String>, parent: u32) -> Result<Self> {
        let required: &[&str] = match names.launcher {
            Launcher::Torchrun => &[names.rank, names.size, names.local_rank, MASTER_ADDR, MASTER_PORT],
            _ => &[names.rank, names.size, names.local_rank],
        };
        let (set, missing): (Vec<&str>, Vec<&str>) = required.iter().partition(|name| get(name).is_some());
        if !missing.is_empty() {
            return Err(wrong(format!(
                "{} set, but not {}: start all ranks by one launcher (torchrun --no-python, srun, mpirun, or --nproc), or \
                 set what is missing; to train alone, unset {}",
                are(&set),
                missing.join(", "),
                set.join(", ")
            )));
        }
        let needed = |name: &str| -> Result<usize> { Ok(number(get, name)?.unwrap_or_default()) };
        let (rank, size, local_rank) = (needed(names.rank)?, needed(names.size)?, needed(names.local_rank)?);
        let local_size = match names.launcher {
            Launcher::Slurm => get(names.local_size).and_then(|of| tasks_here(&of, get("SLURM_NODEID")?.parse().ok()?)),
            _ => number(get, names.local_size)?,
        };
        // Where nobody says it, all are here, or all that come before.
        let local_size = local_size.unwrap_or(if rank == local_rank { size } else { local_rank + 1 });
        for (name, value, of, limit) in
            [(names.rank, rank, names.size, size), (names.local_rank, local_rank, names.local_size, local_size)]
        {
            if value >= limit {
                return Err(wrong(format!("{name} is {value}, which is not one of {limit} ranks ({of})")));
            }
        }
        if local_size > size {
            return Err(wrong(format!(
                "{} is {local_size}, more than {}, which is {size}",
                names.local_size, names.size
            )));
        }
        let master = master(names.launcher, get, local_size == size, parent)?;
        Ok(Self { launcher: names.launcher, rank, size, local_rank, local_size, master })
    }

    /// Where rank 0 is found.
    ///
    /// # Errors
    /// When that is not known.
    pub(super) fn master(&self) -> Result<&Address> {
        self.master.as_ref().ok_or_else(|| {
            wrong(format!(
                "where rank 0 is found is not known: set {MASTER_ADDR} to its machine and {MASTER_PORT} to a free port there, \
                 for all ranks (mpirun -x {MASTER_ADDR}=... -x {MASTER_PORT}=...)"
            ))
        })
    }

    /// Variables that make a process of this machine such a rank.
    pub(super) fn variables(&self) -> impl Iterator<Item = (&'static str, String)> {
        let numbers = [
            (TORCHRUN.rank, self.rank),
            (TORCHRUN.size, self.size),
            (TORCHRUN.local_rank, self.local_rank),
            (TORCHRUN.local_size, self.local_size),
        ];
        let master = self.master.iter();
        let master = master.flat_map(|at| [(MASTER_ADDR, at.host.clone()), (MASTER_PORT, at.port.to_string())]);
        numbers.map(|(name, number)| (name, number.to_string())).into_iter().chain(master)
    }
}

fn wrong(what: String) -> Error {
    Error::Launch(what)
}

fn are(names: &[&str]) -> String {
    format!("{} {}", names.join(", "), if names.len() == 1 { "is" } else { "are" })
}

fn number(get: &dyn Fn(&str) -> Option<String>, name: &str) -> Result<Option<usize>> {
    let Some(text) = get(name) else { return Ok(None) };
    let value = text.trim().parse().map_err(|_| wrong(format!("{name} is {text:?}, expected a whole number")))?;
    Ok(Some(value))
}

/// Where rank 0 is found: as it was said, else as the launcher's numbers allow all ranks to know it.
fn master(
    launcher: Launcher,
    get: &dyn Fn(&str) -> Option<String>,
    here: bool,
    parent: u32,
) -> Result<Option<Address>> {
    let port = match get(MASTER_PORT) {
        Some(text) => {
            let port = text.trim().parse().ok().filter(|port: &u16| *port > 0);
            Some(port.ok_or_else(|| wrong(format!("{MASTER_PORT} is {text:?}, expected a port from 1 to 65535")))?)
        }
        None => None,
    };
    // Ports that systems do not hand out by themselves.
    let from = |number: u32| 12_000 + (number % 20_000) as u16;
    let (host, own) = match launcher {
        Launcher::Torchrun => (None, None),
        Launcher::Slurm => {
            let nodes = get("SLURM_STEP_NODELIST").or_else(|| get("SLURM_JOB_NODELIST"));
            let job = get("SLURM_JOB_ID").and_then(|id| id.trim().parse().ok());
            (nodes.map(|nodes| first_host(&nodes)), job.map(from))
        }
        // All processes of a machine have one parent.
        Launcher::OpenMpi | Launcher::Mpich => (here.then(|| "127.0.0.1".into()), here.then(|| from(parent))),
    };
    let (Some(host), Some(port)) = (get(MASTER_ADDR).or(host), port.or(own)) else { return Ok(None) };
    let agent = launcher == Launcher::Torchrun && get(AGENT_LISTENS).is_some_and(|set| set == "True");
    let port = if agent { port.checked_add(1) } else { Some(port) };
    let port =
        port.ok_or_else(|| wrong(format!("{MASTER_PORT}: torchrun listens there, and there is no port behind it")))?;
    Ok(Some(Address { host, port }))
}

/// The first of a list of hosts as Slurm writes it: `node[07-09,12],other`.
fn first_host(list: &str) -> String {
    let end = list.find([',', '[']).unwrap_or(list.len());
    let (name, rest) = list.split_at(end);
    match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((numbers, behind)) => {
            let first = numbers.split([',', '-']).next().unwrap_or_default();
            // A suffix, or more brackets, up to the next host.
            format!("{name}{first}{}", first_host(behind))
        }
        None => name.into(),
    }
}

/// How many tasks a node has, of what Slurm writes for all: `2(x3),1`.
fn tasks_here(of_nodes: &str, node: usize) -> Option<usize> {
    let mut from = 0;
    for part in of_nodes.split(',') {
        let (tasks, nodes) = match part.split_once("(x") {
            Some((tasks, nodes)) => (tasks, nodes.strip_suffix(')')?.parse().ok()?),
            None => (part, 1),
        };
        from += nodes;
        if node < from {
            return tasks.parse().ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Option<World>> {
        let get = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        World::of(&get, 40_123)
    }

    fn world(variables: &[(&str, &str)]) -> World {
        of(variables).unwrap().unwrap()
    }

    const RUN: [(&str, &str); 6] = [
        ("RANK", "5"),
        ("WORLD_SIZE", "8"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "4"),
        ("MASTER_ADDR", "head"),
        ("MASTER_PORT", "29500"),
    ];

    #[test]
    fn launchers_are_understood() {
        assert_eq!(of(&[]).unwrap(), None);
        let found = world(&RUN);
        let master = Address { host: "head".into(), port: 29_500 };
        let wanted = World {
            launcher: Launcher::Torchrun,
            rank: 5,
            size: 8,
            local_rank: 1,
            local_size: 4,
            master: Some(master),
        };
        assert_eq!(found, wanted);
        // What is written for a process is what it reads.
        let written: Vec<_> = wanted.variables().collect();
        assert_eq!(world(&written.iter().map(|(name, value)| (*name, value.as_str())).collect::<Vec<_>>()), wanted);
        // torchrun's own store has the port.
        assert_eq!(
            world(&[&RUN[..], &[("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat()).master().unwrap().port,
            29_501
        );

        let slurm = [
            ("SLURM_PROCID", "6"),
            ("SLURM_STEP_NUM_TASKS", "7"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_NODEID", "3"),
            ("SLURM_STEP_TASKS_PER_NODE", "2(x3),1"),
            ("SLURM_STEP_NODELIST", "gpu[07-09,12]"),
            ("SLURM_JOB_ID", "1234567"),
        ];
        let found = world(&slurm);
        assert_eq!((found.launcher, found.rank, found.size, found.local_size), (Launcher::Slurm, 6, 7, 1));
        assert_eq!(found.master, Some(Address { host: "gpu07".into(), port: 12_000 + (1_234_567 % 20_000) as u16 }));
        // Scripts say where the first machine is, and how many there are.
        let said = [&slurm[..], &[("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "7777"), ("WORLD_SIZE", "7")]].concat();
        assert_eq!(world(&said).master().unwrap().to_string(), "10.0.0.1:7777");
        // The script of sbatch is none of the tasks.
        assert_eq!(of(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4"), ("SLURM_LOCALID", "0")]).unwrap(), None);

        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ];
        let found = world(&mpi);
        assert_eq!(
            (found.launcher, found.master().unwrap().to_string()),
            (Launcher::OpenMpi, "127.0.0.1:12123".into())
        );
        let apart = [&mpi[..3], &[("OMPI_COMM_WORLD_LOCAL_SIZE", "1"), ("OMPI_COMM_WORLD_LOCAL_RANK", "0")]].concat();
        let apart: Vec<_> = apart.into_iter().filter(|pair| *pair != mpi[2]).collect();
        assert!(world(&apart).master().unwrap_err().to_string().contains("mpirun -x MASTER_ADDR"));
    }

    #[test]
    fn what_is_half_set_or_does_not_fit_is_named() {
        let message = |variables: &[(&str, &str)]| of(variables).unwrap_err().to_string();
        let error = message(&RUN[..2]);
        assert!(error.contains("RANK, WORLD_SIZE are set, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"), "{error}");
        let error = message(&[("WORLD_SIZE", "4")]);
        assert!(error.contains("WORLD_SIZE is set, but not RANK") && error.contains("unset WORLD_SIZE"), "{error}");
        for (name, value, what) in [
            ("RANK", "8", "RANK is 8, which is not one of 8 ranks (WORLD_SIZE)"),
            ("RANK", "-1", "RANK is \"-1\", expected a whole number"),
            ("LOCAL_RANK", "4", "LOCAL_RANK is 4"),
            ("LOCAL_WORLD_SIZE", "9", "LOCAL_WORLD_SIZE is 9, more than WORLD_SIZE"),
            ("MASTER_PORT", "0", "expected a port"),
        ] {
            let changed: Vec<_> = RUN.map(|pair| if pair.0 == name { (name, value) } else { pair }).into();
            let error = message(&changed);
            assert!(error.contains(what), "{error}");
        }
        let slurm = [("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_LOCALID", "0"), ("WORLD_SIZE", "4")];
        let slurm = [&slurm[..], &[("SLURM_JOB_NODELIST", "a,b"), ("SLURM_JOB_ID", "1")]].concat();
        assert!(message(&slurm).contains("WORLD_SIZE is 4, but SLURM_STEP_NUM_TASKS is 2"));
    }

    #[test]
    fn lists_of_slurm_are_read() {
        let hosts =
            [("a", "a"), ("a,b", "a"), ("n[1-3]", "n1"), ("n[01,7-9],m", "n01"), ("r[2-3]c[5,6]-ib,x", "r2c5-ib")];
        hosts.into_iter().for_each(|(list, host)| assert_eq!(first_host(list), host));
        assert_eq!([0, 2, 3].map(|node| tasks_here("2(x3),1", node)), [Some(2), Some(2), Some(1)]);
        assert_eq!((tasks_here("4", 0), tasks_here("4", 1), tasks_here("2(x", 0)), (Some(4), None, None));
    }
}
